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
from scipy import optimize, stats

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8


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
    """Smallest true difference between two such groups that Welch's test would find with a power of 80 %."""


@dataclass(frozen=True)
class Difference:
    """Mean of the first group minus mean of the second, over seeds."""

    difference: Interval
    """Welch's interval."""
    p: float
    """Of Welch's test, not corrected for other tests."""
    effect_size: float
    """Hedges' g: the difference in standard deviations, without the bias of small groups; infinite without a spread."""


@dataclass(frozen=True)
class VarianceSplit:
    """Spread between seeds and spread between repetitions of the same seed, as standard deviations."""

    seed_sd: float
    """Component of the seeds alone; 0 where repetitions explain all of the spread."""
    repeat_sd: float
    """Of repetitions with the same seed: what is not deterministic."""
    p: float
    """Of the hypothesis that seeds add nothing to what repetitions vary (F test)."""


def summarize(values: ArrayLike) -> Summary:
    """Mean, spread, 95 % interval, extremes and resolution of one group.

    Args:
        values: at least one finite score.
    """
    scores = _scores("values", values, at_least=1)
    n, mean = len(scores), float(scores.mean())
    if n == 1:
        return Summary(1, mean, None, None, None, mean, mean, None)
    sd = float(scores.std(ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / n**0.5
    return Summary(n, mean, sd, mean - half, mean + half, float(scores.min()), float(scores.max()), resolvable(n, sd))


def welch(first: ArrayLike, second: ArrayLike) -> Difference:
    """Compare the means of two groups of at least two scores, which may differ in spread and size.

    Two groups without any spread differ for certain or not at all: the interval is a point and p is 0 or 1.
    """
    a, b = (_scores(name, v, at_least=2) for name, v in (("first", first), ("second", second)))
    estimate = float(a.mean() - b.mean())
    spread = pooled_sd(a.std(ddof=1), b.std(ddof=1))
    if spread == 0:
        g = float(np.sign(estimate)) * np.inf if estimate else 0.0
        return Difference(Interval(estimate, estimate, estimate), p=float(estimate == 0), effect_size=g)
    test: Any = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    unbiased = 1 - 3 / (4 * (len(a) + len(b)) - 9)  # Hedges 1981
    return Difference(Interval(estimate, float(low), float(high)), float(test.pvalue), unbiased * estimate / spread)


def paired(differences: ArrayLike) -> tuple[Interval, float]:
    """Interval and p (t test) of the mean of differences within the same runs, at least two."""
    values = _scores("differences", differences, at_least=2)
    found = summarize(values)
    assert found.low is not None
    assert found.high is not None
    test: Any = None if found.sd == 0 else stats.ttest_1samp(values, 0)
    p = float(found.mean == 0) if test is None else float(test.pvalue)
    return Interval(found.mean, found.low, found.high), p


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


def pooled_sd(first: float, second: float) -> float:
    """Standard deviation that stands for two groups of equal weight."""
    return float(np.sqrt((first**2 + second**2) / 2))


def power(effect: float, n: int) -> float:
    """Probability that a two-sample t test with n scores per group finds a difference of ``effect`` deviations.

    The square of a noncentral t is a noncentral F, whose two tails are one: SciPy's lower tail of t underflows to NaN.
    """
    df = 2 * n - 2
    return float(stats.ncf.sf(stats.f.ppf(1 - ALPHA, 1, df), 1, df, effect**2 * n / 2))


def resolvable(n: int, sd: float) -> float:
    """Smallest difference of two groups of n >= 2 scores with this deviation that is found with a power of 80 %."""
    if n < 2:
        raise ValueError(f"n: got {n}, accepted: at least 2")
    return sd * _resolvable_effect(n)


@cache
def _resolvable_effect(n: int) -> float:
    root: Any = optimize.brentq(lambda effect: power(effect, n) - POWER, 1e-6, 100)
    return float(root)


def seeds_needed(difference: float, sd: float, most: int = 10_000) -> int | None:
    """Seeds per group that resolve a difference of this size with a power of 80 %; None: more than ``most``."""
    if not difference > 0:
        raise ValueError(f"difference: got {difference}, accepted: a positive number")
    effect = min(difference / sd, 100.0) if sd > 0 else 100.0  # two seeds are enough long before
    enough = bisect_left(range(most + 1), POWER, lo=2, key=lambda n: power(effect, n))
    return enough if enough <= most else None


def split_variance(groups: Sequence[ArrayLike]) -> VarianceSplit | None:
    """Split the variance by a one-way analysis with random effects (moment estimator, groups of any size).

    Args:
        groups: scores of the repetitions of each seed.

    Returns:
        None where there is nothing to split: fewer than two seeds, or no seed with two repetitions.
    """
    scores = [_scores("groups", group, at_least=1) for group in groups]
    sizes = np.array([len(group) for group in scores])
    k, total = len(scores), int(sizes.sum())
    if k < 2 or total == k:
        return None
    within = sum(float(((group - group.mean()) ** 2).sum()) for group in scores) / (total - k)
    grand = np.concatenate(scores).mean()
    between = float((sizes * (np.array([group.mean() for group in scores]) - grand) ** 2).sum()) / (k - 1)
    size = (total - (sizes**2).sum() / total) / (k - 1)
    seed_variance = max(0.0, (between - within) / size)
    p = float(stats.f.sf(between / within, k - 1, total - k)) if within > 0 else float(between == 0)
    return VarianceSplit(seed_sd=seed_variance**0.5, repeat_sd=within**0.5, p=p)


def _scores(name: str, values: ArrayLike, at_least: int) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) < at_least or not np.isfinite(scores).all():
        raise ValueError(f"{name}: got {np.array(values).tolist()}, accepted: at least {at_least} finite numbers")
    return scores
