"""Is a difference real? Spread over seeds, tests between groups of runs, and what more seeds would show.

Pure functions on arrays, built on SciPy. Scores come in any unit (percentage points in the reports) and leave in it. A
*group* holds one score per seed. Tests are two-sided.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize as scipy_optimize
from scipy import stats as scipy_stats

optimize: Any = scipy_optimize  # SciPy has no types
stats: Any = scipy_stats

ALPHA, CONFIDENCE, POWER = 0.05, 0.95, 0.8
_ROUNDING = 1e-9  # a spread that is a smaller part of the scores than this is none


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """A group of scores, of which ``n`` are independent.

    ``sd`` is the standard deviation over the seeds (with n - 1), ``low`` and ``high`` are the ends of Student's
    interval of the mean, ``resolvable`` is what :func:`resolvable` tells. One score has none of these four: None.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    min: float
    max: float
    resolvable: float | None


@dataclass(frozen=True)
class Tested(Interval):
    """A mean, or a difference of two, with the p of its being 0, not corrected for other tests.

    ``effect_size`` of two groups is Hedges' g: the difference in standard deviations (root mean of both variances),
    without the bias of small groups.
    """

    p: float
    effect_size: float | None = None


@dataclass(frozen=True)
class VarianceSplit:
    """Spread between seeds and spread between repetitions of the same seed, as standard deviations.

    ``seed_sd`` is that of the seeds alone: 0 where repetitions explain all of the spread, None with a single seed.
    ``repeat_sd`` is what is not deterministic. ``p`` is of the hypothesis that seeds add nothing (F test); None with a
    single seed, or where repetitions do not vary.
    """

    seed_sd: float | None
    repeat_sd: float
    p: float | None


def summarize(values: ArrayLike, independent: int | None = None) -> Summary:
    """Mean, spread, 95 % interval, extremes and resolution of at least one score.

    ``independent`` is as how many scores they count where they share something that varies; None: all. With 3 x 3
    crossed seeds it is 3, which errs on the safe side.
    """
    scores = np.asarray(values, np.float64)
    n, mean = independent or len(scores), float(scores.mean())
    if n == 1:
        return Summary(1, mean, None, None, None, mean, mean, None)
    sd = _sd(scores)
    half = float(stats.t.isf((1 - CONFIDENCE) / 2, n - 1)) * sd / n**0.5
    return Summary(n, mean, sd, mean - half, mean + half, scores.min().item(), scores.max().item(), resolvable(n, sd))


def welch(first: ArrayLike, second: ArrayLike, independent: tuple[int, int] | None = None) -> Tested | None:
    """Compare the means of two groups of at least two scores, which may differ in spread and size.

    ``independent`` is that of each group, as for :func:`summarize`. None is returned where neither has a spread: there
    is nothing to test against.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    n = np.array(independent or (len(a), len(b)))
    variances = np.array([_sd(a), _sd(b)]) ** 2
    if not variances.any():
        return None
    found = _t_test(float(a.mean() - b.mean()), variances / n, n - 1)
    unbiased = 1 - 3 / (4 * float(_satterthwaite(variances, n - 1)) - 1)  # Hedges 1981, with the df of unequal spreads
    return replace(found, effect_size=unbiased * found.estimate / float(variances.mean() ** 0.5))


def paired(differences: ArrayLike, independent: int | None = None) -> Tested | None:
    """Test the mean of at least two differences within the same runs (t test); else as :func:`welch`."""
    scores = np.asarray(differences, np.float64)
    n, sd = independent or len(scores), _sd(scores)
    return _t_test(float(scores.mean()), np.array([sd**2 / n]), n - 1) if sd else None


def _t_test(estimate: float, variances: NDArray[np.float64], df: ArrayLike) -> Tested:
    """Of an estimate that is a sum of means, from the variance of each, which has so many degrees of freedom."""
    error, df = float(variances.sum()) ** 0.5, _satterthwaite(variances, df)
    half = error * stats.t.isf((1 - CONFIDENCE) / 2, df)
    return Tested(
        estimate, float(estimate - half), float(estimate + half), float(2 * stats.t.sf(abs(estimate) / error, df))
    )


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
    first: Sequence[NDArray[np.int64]], second: Sequence[NDArray[np.int64]], resamples: int = 2000, seed: int = 0
) -> Interval:
    """Difference of the mean mIoU of two groups of trained networks, with its interval over the images (percentile).

    The same resampled images are given to all runs, so that what makes an image hard cancels. The networks are held
    fixed: this interval says what other images of the kind would show, not what other seeds would. Each run is int64
    (n, 3, C) over the same n >= 2 images: true positives, predicted and true pixels of each.
    """
    counts = [np.asarray(run, dtype=np.float64) for run in (*first, *second)]
    n = len(counts[0])
    draws = np.random.default_rng(seed).integers(n, size=(resamples, n))
    times = np.stack([np.ones(n), *(np.bincount(draw, minlength=n) for draw in draws)])  # of each image, at first once
    scores = np.stack([_miou(np.tensordot(times, run, axes=1)) for run in counts])
    differences = scores[: len(first)].mean(0) - scores[len(first) :].mean(0)
    low, high = np.quantile(differences[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(differences[0]), float(low), float(high))


def _miou(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 3, C) -> (...): mean over the classes that occur."""
    tp, union = counts[..., 0, :], counts[..., 1, :] + counts[..., 2, :] - counts[..., 0, :]
    iou = np.divide(tp, union, out=np.zeros_like(tp), where=union > 0)
    return iou.sum(-1) / np.maximum((union > 0).sum(-1), 1)


def power(difference: float, sds: tuple[float, float], n: int) -> float:
    """Probability that Welch's test with n >= 2 scores per group, of deviations not both 0, finds this difference > 0.

    Exact for normal scores. Of the pooled sum of squares a Beta-distributed share is the first group's, independent of
    the sum; the share fixes the degrees of freedom that the test estimates, and given it the statistic is a noncentral
    t up to a factor. The power is averaged over the share's quantiles (Gauss-Legendre). The square of a noncentral t is
    a noncentral F, whose two tails are one: SciPy's lower tail of t underflows to NaN.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    share = stats.beta.ppf((nodes + 1) / 2, (n - 1) / 2, (n - 1) / 2)
    variances = np.square(sds)
    estimated = variances[:, None] * np.stack([share, 1 - share])
    critical = stats.t.isf(ALPHA / 2, _satterthwaite(estimated, n - 1)) ** 2 * 2 * estimated.sum(0) / variances.sum()
    found = stats.ncf.sf(critical, 1, 2 * n - 2, difference**2 * n / variances.sum())
    return float(weights @ found / 2)


def resolvable(n: int, sd: float) -> float:
    """Smallest difference that Welch's test of two groups of n >= 2 scores, both of this deviation, finds with 80 %."""
    return sd * _resolvable_effect(n)


@cache
def _resolvable_effect(n: int) -> float:
    def lacking(effect: float) -> float:
        return power(effect, (1, 1), n) - POWER

    return float(optimize.brentq(lacking, 1e-3, 100))


def seeds_needed(difference: float, sds: tuple[float, float], most: int = 10_000) -> int | None:
    """Seeds per group, whose deviations are ``sds``, with which Welch's test finds this difference > 0 with 80 %.

    None: more than ``most``.
    """
    if difference > 100 * max(sds):
        return 2
    enough = bisect_left(range(most + 1), POWER, lo=2, key=lambda n: power(difference, sds, n))
    return enough if enough <= most else None


def split_variance(groups: Sequence[ArrayLike]) -> VarianceSplit | None:
    """Split the variance of the repetitions of each seed by a one-way analysis with random effects (moment estimator).

    The groups may have any size; None is returned where no seed has two repetitions.
    """
    scores = [np.asarray(group, np.float64) for group in groups]
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
    p = float(stats.f.sf(between / within, k - 1, total - k)) if within > 0 else None
    return VarianceSplit(seed_sd if seed_sd > _ROUNDING * abs(grand) else 0.0, within**0.5, p)


def _sd(scores: NDArray[np.float64]) -> float:
    """Standard deviation with n - 1; 0 where it is nothing but rounding."""
    sd = float(scores.std(ddof=1))
    return sd if sd > _ROUNDING * float(np.abs(scores).max()) else 0.0
