"""Is a difference real? Spread over seeds, tests between groups of runs, and what more seeds would show.

Pure functions on arrays, built on SciPy. Scores come in any unit (percentage points in the reports) and leave in it. A
*group* holds one score per seed. Tests are two-sided.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8
_ROUNDING = 1e-9  # a spread that is a smaller part of the scores than this is none


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """A group of scores. What one score cannot tell (spread, interval, resolution) is None."""

    n: int
    """Of the independent ones."""
    mean: float
    sd: float | None
    """Standard deviation over the seeds, with n - 1."""
    low: float | None
    """Lower end of the confidence interval of the mean (Student's t)."""
    high: float | None
    """Upper end."""
    min: float
    max: float
    resolvable: float | None
    """Smallest true difference of two groups with this n and spread that Welch's test finds with a power of 80 %."""


@dataclass(frozen=True)
class Difference:
    """Mean of the first group minus mean of the second, over seeds."""

    difference: Interval
    """Welch's interval."""
    p: float
    """Of Welch's test, not corrected for other tests."""
    effect_size: float
    """Hedges' g: the difference in standard deviations (root mean of both variances), without the bias of small groups,
    for groups of unequal spread and size."""


@dataclass(frozen=True)
class VarianceSplit:
    """Spread between seeds and spread between repetitions of the same seed, as standard deviations."""

    seed_sd: float | None
    """Component of the seeds alone; 0 where repetitions explain all of the spread, None with a single seed."""
    repeat_sd: float
    """Of repetitions with the same seed: what is not deterministic."""
    p: float | None
    """Of the hypothesis that seeds add nothing to what repetitions vary (F test); None with a single seed, or where
    repetitions do not vary."""


def summarize(values: ArrayLike, independent: int | None = None) -> Summary:
    """Mean, spread, 95 % interval, extremes and resolution of one group.

    Args:
        values: at least one finite score.
        independent: as how many independent scores they count, where they share something that varies; None: all.
            With 3 x 3 crossed seeds it is 3, which errs on the safe side.
    """
    scores = _scores("values", values, at_least=1)
    n, mean = independent or len(scores), float(scores.mean())
    if n == 1:
        return Summary(1, mean, None, None, None, mean, mean, None)
    sd = _sd(scores)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / n**0.5
    return Summary(n, mean, sd, mean - half, mean + half, float(scores.min()), float(scores.max()), resolvable(n, sd))


def welch(first: ArrayLike, second: ArrayLike, independent: tuple[int, int] | None = None) -> Difference | None:
    """Compare the means of two groups of at least two scores, which may differ in spread and size.

    Args:
        first: scores.
        second: scores.
        independent: of each group, as for :func:`summarize`.

    Returns:
        None where neither has a spread: there is nothing to test against.
    """
    a, b = (_scores(name, v, at_least=2) for name, v in (("first", first), ("second", second)))
    variances = np.array([_sd(a), _sd(b)]) ** 2
    if not variances.any():
        return None
    n = np.array(independent or (len(a), len(b)))
    estimate, error = float(a.mean() - b.mean()), float((variances / n).sum() ** 0.5)
    df = float(_satterthwaite(variances / n, n - 1))
    low, high = stats.t.interval(CONFIDENCE, df, estimate, error)
    p = 2 * float(stats.t.sf(abs(estimate) / error, df))
    unbiased = 1 - 3 / (4 * float(_satterthwaite(variances, n - 1)) - 1)  # Hedges 1981, with the df of unequal spreads
    g = unbiased * estimate / float(variances.mean() ** 0.5)
    return Difference(Interval(estimate, float(low), float(high)), p, g)


def paired(differences: ArrayLike, independent: int | None = None) -> tuple[Interval, float] | None:
    """Interval and p (t test) of the mean of differences within the same runs, at least two; else as :func:`welch`."""
    found = summarize(_scores("differences", differences, at_least=2), independent)
    assert found.sd is not None
    assert found.low is not None
    assert found.high is not None
    if found.sd == 0:
        return None
    p = 2 * float(stats.t.sf(abs(found.mean) / found.sd * found.n**0.5, found.n - 1))
    return Interval(found.mean, found.low, found.high), p


def _satterthwaite(variances: NDArray[np.float64], df: ArrayLike) -> Any:
    """Degrees of freedom of a sum of variances, along the first axis."""
    return variances.sum(0) ** 2 / (variances**2 / np.asarray(df)).sum(0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (Scandinavian Journal of Statistics 1979): p-values that may be read as if each stood alone."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted.tolist()


def bootstrap_images(
    first: Sequence[NDArray[np.int64]],
    second: Sequence[NDArray[np.int64]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Difference of the mean mIoU of two groups of trained networks, with its interval over the images (percentile).

    The same resampled images are given to all runs, so that what makes an image hard cancels. The networks are held
    fixed: this interval says what other images of the kind would show, not what other seeds would.

    Args:
        first: one array for each run, int64 (n, 3, C): true positives, predicted and true pixels of each image.
        second: likewise, the same images in the same order.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        In [-1, 1].
    """
    counts = [np.asarray(run, dtype=np.float64) for run in (*first, *second)]
    n = len(counts[0])
    if not first or not second or any(run.shape != counts[0].shape for run in counts) or n < 2:
        shapes = [run.shape for run in counts]
        raise ValueError(f"first, second: got {shapes}, accepted: at least one run each, all over the same images (2+)")

    def difference(index: NDArray[np.intp], axis: int = -1) -> NDArray[np.float64]:
        samples = index.reshape(-1, n)
        flat = (samples + n * np.arange(len(samples))[:, None]).ravel()
        times = np.bincount(flat, minlength=samples.size).reshape(-1, n).astype(np.float64)  # of each image
        scores = np.stack([_miou(np.tensordot(times, run, axes=(1, 0))) for run in counts])
        return (scores[: len(first)].mean(0) - scores[len(first) :].mean(0)).reshape(index.shape[:-1])

    images = np.arange(n)
    interval = stats.bootstrap(
        (images,), difference, n_resamples=resamples, batch=250, vectorized=True, confidence_level=CONFIDENCE,
        method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(float(difference(images)), float(interval.low), float(interval.high))


def _miou(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 3, C) -> (...): mean over the classes that occur."""
    tp, union = counts[..., 0, :], counts[..., 1, :] + counts[..., 2, :] - counts[..., 0, :]
    iou = np.divide(tp, union, out=np.zeros_like(tp), where=union > 0)
    return iou.sum(-1) / np.maximum((union > 0).sum(-1), 1)


def power(difference: float, sds: tuple[float, float], n: int) -> float:
    """Probability that Welch's test with n >= 2 scores per group finds a true difference > 0.

    Exact for normal scores. Of the pooled sum of squares a Beta-distributed share is the first group's, independent of
    the sum; the share fixes the degrees of freedom that the test estimates, and given it the statistic is a noncentral
    t up to a factor. The power is averaged over the share's quantiles (Gauss-Legendre). The square of a noncentral t is
    a noncentral F, whose two tails are one: SciPy's lower tail of t underflows to NaN.

    Args:
        difference: of the means.
        sds: standard deviations of the groups, not both 0.
        n: scores in each of them.
    """
    nodes, weights = special.roots_legendre(64)
    share = stats.beta.ppf((nodes + 1) / 2, (n - 1) / 2, (n - 1) / 2)
    variances = np.square(sds)
    estimated = variances[:, None] * np.stack([share, 1 - share])
    critical = stats.t.isf(ALPHA / 2, _satterthwaite(estimated, n - 1)) ** 2 * 2 * estimated.sum(0) / variances.sum()
    found = stats.ncf.sf(critical, 1, 2 * n - 2, difference**2 * n / variances.sum())
    return float(weights @ found / 2)


def resolvable(n: int, sd: float) -> float:
    """Smallest difference that Welch's test of two groups of n >= 2 scores finds with a power of 80 %, if both have
    this deviation.
    """
    if n < 2:
        raise ValueError(f"n: got {n}, accepted: at least 2")
    return sd * _resolvable_effect(n)


@cache
def _resolvable_effect(n: int) -> float:
    root: Any = optimize.brentq(lambda effect: power(effect, (1, 1), n) - POWER, 1e-3, 100)
    return float(root)


def seeds_needed(difference: float, sds: tuple[float, float], most: int = 10_000) -> int | None:
    """Seeds per group with which Welch's test finds a difference of this size with a power of 80 %.

    Args:
        difference: of the means.
        sds: standard deviations of the groups.
        most: the highest number that is tried.

    Returns:
        None: more than ``most``.
    """
    if not difference > 0:
        raise ValueError(f"difference: got {difference}, accepted: a positive number")
    if difference > 100 * max(sds):
        return 2
    enough = bisect_left(range(most + 1), POWER, lo=2, key=lambda n: power(difference, sds, n))
    return enough if enough <= most else None


def split_variance(groups: Sequence[ArrayLike]) -> VarianceSplit | None:
    """Split the variance by a one-way analysis with random effects (moment estimator, groups of any size).

    Args:
        groups: scores of the repetitions of each seed.

    Returns:
        None where no seed has two repetitions.
    """
    scores = [_scores("groups", group, at_least=1) for group in groups]
    sizes = np.array([len(group) for group in scores])
    k, total = len(scores), int(sizes.sum())
    if total == k:
        return None
    within = sum(_sd(group) ** 2 * (len(group) - 1) for group in scores if len(group) > 1) / (total - k)
    if k < 2:
        return VarianceSplit(seed_sd=None, repeat_sd=within**0.5, p=None)
    grand = np.concatenate(scores).mean()
    between = float((sizes * (np.array([group.mean() for group in scores]) - grand) ** 2).sum()) / (k - 1)
    size = (total - (sizes**2).sum() / total) / (k - 1)
    seed_sd = max(0.0, (between - within) / size) ** 0.5
    seed_sd = seed_sd if seed_sd > _ROUNDING * abs(grand) else 0.0
    p = float(stats.f.sf(between / within, k - 1, total - k)) if within > 0 else None
    return VarianceSplit(seed_sd=seed_sd, repeat_sd=within**0.5, p=p)


def _sd(scores: NDArray[np.float64]) -> float:
    """Standard deviation with n - 1; 0 where it is nothing but rounding."""
    sd = float(scores.std(ddof=1))
    return sd if sd > _ROUNDING * float(np.abs(scores).max()) else 0.0


def _scores(name: str, values: ArrayLike, at_least: int) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) < at_least or not np.isfinite(scores).all():
        raise ValueError(f"{name}: got {np.array(values).tolist()}, accepted: at least {at_least} finite numbers")
    return scores
