"""Is a difference real? Spread over seeds, tests between groups of runs, and what more seeds would show.

Pure functions on arrays, built on SciPy. Scores may have any unit (percentage points in the reports), and results have
the same unit. A *group* holds one score per seed. Tests are two-sided.
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
_ROUNDING = 1e-9  # a standard deviation below this share of the scores is rounding, and counts as 0


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """Summary of a group of scores, which count as ``n`` independent ones.

    ``sd`` is the sample standard deviation (ddof=1), ``low`` and ``high`` are the ends of Student's 95 % interval of
    the mean, and ``resolvable`` is the result of :func:`resolvable`. These four are None if ``n`` is 1.
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
    """A t test: the estimate is a mean or a difference of two means, ``p`` tests the hypothesis that it is 0.

    ``p`` is not corrected for multiple tests. ``effect_size``, for two groups only, is Hedges' g: the difference
    divided by the root mean square of both standard deviations, corrected for the bias of small groups.
    """

    p: float
    effect_size: float | None = None


@dataclass(frozen=True)
class VarianceSplit:
    """Spread between seeds and spread between repetitions of the same seed, as standard deviations.

    ``seed_sd`` is the spread that seeds add to that of repetitions: 0 if repetitions explain all of the spread, None
    with a single seed. ``repeat_sd`` is the spread of repetitions, which comes from nondeterministic operations. ``p``
    tests the hypothesis that seeds add nothing (F test); None with a single seed, or if repetitions do not vary.
    """

    seed_sd: float | None
    repeat_sd: float
    p: float | None


def summarize(values: ArrayLike, independent: int | None = None) -> Summary:
    """Return mean, spread, 95 % interval, extremes and resolution of at least one score.

    ``independent`` is the number of independent scores that the values count as; None: all of them. It is smaller if
    values share a source of variation: 3 x 3 crossed seeds count as 3 scores, which errs on the safe side.
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

    ``independent`` holds the number of independent scores of each group, as in :func:`summarize`. Returns None if
    neither group has a spread, as there is nothing to test against.
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
    """Test the mean of at least two differences within runs (paired t test); None if they have no spread.

    ``independent`` is their number of independent values, as in :func:`summarize`.
    """
    scores = np.asarray(differences, np.float64)
    n, sd = independent or len(scores), _sd(scores)
    return _t_test(float(scores.mean()), np.array([sd**2 / n]), n - 1) if sd else None


def _t_test(estimate: float, variances: NDArray[np.float64], df: ArrayLike) -> Tested:
    """Test an estimate, a sum or difference of means, given the variance of each mean and its degrees of freedom."""
    error, df = float(variances.sum()) ** 0.5, _satterthwaite(variances, df)
    half = error * stats.t.isf((1 - CONFIDENCE) / 2, df)
    return Tested(
        estimate, float(estimate - half), float(estimate + half), float(2 * stats.t.sf(abs(estimate) / error, df))
    )


def _satterthwaite(variances: NDArray[np.float64], df: ArrayLike) -> Any:
    """Return the Welch-Satterthwaite degrees of freedom of a sum of variances (first axis) with ``df`` each."""
    return variances.sum(0) ** 2 / (variances**2 / np.asarray(df)).sum(0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple tests with Holm's method (Scandinavian Journal of Statistics, 1979), in order."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted.tolist()


def bootstrap_images(
    first: Sequence[NDArray[np.int64]], second: Sequence[NDArray[np.int64]], resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the difference of mean mIoU between two groups of trained networks, with a percentile bootstrap interval.

    All runs are scored on the same resampled images, so that the difficulty of an image cancels. The networks are held
    fixed: the interval covers the choice of images, not the choice of seeds.

    Args:
        first: one array for each run, int64 (n, 3, C), over the same n >= 2 images: true positives, predicted pixels
            and true pixels of each class.
        second: the same for the other group.
        resamples: number of bootstrap samples.
        seed: seed of the resampling.
    """
    counts = [np.asarray(run, dtype=np.float64) for run in (*first, *second)]
    n = len(counts[0])
    draws = np.random.default_rng(seed).integers(n, size=(resamples, n))
    times = np.stack([np.ones(n), *(np.bincount(draw, minlength=n) for draw in draws)])  # row 0: every image once
    scores = np.stack([_miou(np.tensordot(times, run, axes=1)) for run in counts])
    differences = scores[: len(first)].mean(0) - scores[len(first) :].mean(0)
    low, high = np.quantile(differences[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(differences[0]), float(low), float(high))


def _miou(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Counts (..., 3, C) -> mIoU (...) in [0, 1], over the classes that occur in truth or prediction; 0 without any."""
    tp, union = counts[..., 0, :], counts[..., 1, :] + counts[..., 2, :] - counts[..., 0, :]
    iou = np.divide(tp, union, out=np.zeros_like(tp), where=union > 0)
    return iou.sum(-1) / np.maximum((union > 0).sum(-1), 1)


def power(difference: float, sds: tuple[float, float], n: int) -> float:
    """Return the probability that Welch's test of two groups of n >= 2 scores finds a true difference > 0 significant.

    ``sds`` are the standard deviations of the groups, not both 0. The result is exact for normal scores:

    - The first group's share of the pooled sum of squares, each divided by its variance, is Beta-distributed and
      independent of the sum. It determines the degrees of freedom that the test estimates.
    - Given the share, the test statistic is a noncentral t times a factor.
    - The power is averaged over the quantiles of the share (Gauss-Legendre quadrature).

    The code uses the square, a noncentral F, which has both tails in one: SciPy's lower tail of t underflows to NaN.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    share = stats.beta.ppf((nodes + 1) / 2, (n - 1) / 2, (n - 1) / 2)
    variances = np.square(sds)
    estimated = variances[:, None] * np.stack([share, 1 - share])
    critical = stats.t.isf(ALPHA / 2, _satterthwaite(estimated, n - 1)) ** 2 * 2 * estimated.sum(0) / variances.sum()
    found = stats.ncf.sf(critical, 1, 2 * n - 2, difference**2 * n / variances.sum())
    return float(weights @ found / 2)


def resolvable(n: int, sd: float) -> float:
    """Return the smallest difference that Welch's test finds with 80 % power, with n >= 2 scores per group.

    ``sd`` is the standard deviation of both groups.
    """
    return sd * _resolvable_effect(n)


@cache
def _resolvable_effect(n: int) -> float:
    def lacking(effect: float) -> float:
        return power(effect, (1, 1), n) - POWER

    return float(optimize.brentq(lacking, 1e-3, 100))


def seeds_needed(difference: float, sds: tuple[float, float], most: int = 10_000) -> int | None:
    """Return how many seeds per group Welch's test needs to find a difference > 0 with 80 % power.

    ``sds`` are the standard deviations of the groups. Returns None if more than ``most`` are needed.
    """
    if difference > 100 * max(sds):
        return 2
    enough = bisect_left(range(most + 1), POWER, lo=2, key=lambda n: power(difference, sds, n))
    return enough if enough <= most else None


def split_variance(groups: Sequence[ArrayLike]) -> VarianceSplit | None:
    """Split the variance of scores into seeds and repetitions (one-way random effects, moment estimator).

    Each group holds the scores of the repetitions of one seed; sizes may differ. Returns None if no seed has two
    repetitions.
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
    """Sample standard deviation (ddof=1); 0 if it is no more than rounding."""
    sd = float(scores.std(ddof=1))
    return sd if sd > _ROUNDING * float(np.abs(scores).max()) else 0.0
