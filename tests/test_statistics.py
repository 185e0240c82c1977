"""Statistics: known answers, agreement with SciPy's tests and power simulation, coverage and false positives."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bisenet import statistics
from bisenet.statistics import Interval, VarianceSplit


def known(value: Any) -> Any:
    assert value is not None
    return value


REFERENCE = [74.28, 72.96, 73.73, 74.39, 73.77]  # BiSeNetV2, five runs of the reference


def test_the_five_runs_of_the_reference() -> None:
    found = statistics.summarize(REFERENCE)
    assert (found.n, found.min, found.max) == (5, 72.96, 74.39)
    assert found.mean == pytest.approx(73.83, abs=0.005)
    assert found.sd == pytest.approx(0.57, abs=0.005)
    assert (known(found.high) - known(found.low)) / 2 == pytest.approx(0.70, abs=0.005)
    assert found.resolvable == pytest.approx(1.182, abs=0.001)  # Student's: 1.148, by statsmodels


def test_one_score_has_no_spread() -> None:
    found = statistics.summarize([3.5])
    assert (found.n, found.mean, found.sd, found.low, found.resolvable) == (1, 3.5, None, None, None)


@pytest.mark.parametrize(
    ("effect", "n"),
    [(0.2, 394), (0.5, 64), (0.8, 26), (1.0, 17), (1.4, 10), (3.0, 4)],  # statsmodels' TTestIndPower, rounded up
)
def test_seeds_needed_are_those_of_the_tables(effect: float, n: int) -> None:
    assert statistics.seeds_needed(effect, (1.0, 1.0)) == n
    assert statistics.power(effect, (1.0, 1.0), n) >= 0.8 > statistics.power(effect, (1.0, 1.0), n - 1)


@pytest.mark.parametrize(
    ("difference", "sds", "n"),
    [
        (1.4, (1.0, 1.0), 10),
        (3.07, (1.0, 1.0), 3),  # 0.70: Student's test would find it with 0.80
        (3.07, (1.41, 0.1), 3),  # 0.53
        (2.0, (0.3, 1.0), 5),
    ],
)
def test_power_agrees_with_scipys_simulation(difference: float, sds: tuple[float, float], n: int) -> None:
    def normal(mean: float, sd: float, size: tuple[int, ...] | int) -> np.ndarray:
        return generator.normal(mean, sd, size)

    generator = np.random.default_rng(0)
    test = partial(stats.ttest_ind, equal_var=False)
    groups = partial(normal, difference, sds[0]), partial(normal, 0.0, sds[1])
    simulated = stats.power(test, groups, (n, n), significance=0.05, n_resamples=20_000)
    assert statistics.power(difference, sds, n) == pytest.approx(float(simulated.power), abs=0.01)


@given(st.integers(2, 60), st.floats(0.01, 10))
def test_what_n_resolves_needs_n_seeds(n: int, sd: float) -> None:
    difference = statistics.resolvable(n, sd)
    assert statistics.power(difference, (sd, sd), n) == pytest.approx(0.8, abs=1e-6)
    assert statistics.seeds_needed(difference * 1.0001, (sd, sd)) == n


def test_seeds_needed_at_the_ends() -> None:
    assert statistics.seeds_needed(1.0, (0.0, 0.0)) == 2
    assert statistics.seeds_needed(1.0, (0.0, 0.011)) == 2
    assert statistics.seeds_needed(1e-4, (1.0, 1.0)) is None


@pytest.mark.parametrize(
    ("crossed", "independent", "covered", "positive"),
    [(False, None, (0.93, 0.97), (0.03, 0.07)), (True, None, (0, 0.8), (0.2, 1)), (True, 3, (0.95, 1), (0, 0.05))],
    ids=["independent", "crossed, taken for independent", "crossed, counted as 3"],
)
def test_interval_covers_and_welch_is_wrong_as_often_as_it_says(
    crossed: bool, independent: int | None, covered: tuple[float, float], positive: tuple[float, float]
) -> None:
    """The same mean 1000 times: 95 % and 5 % for groups of four and eight of unequal spread, and not for 3 x 3 seeds of
    initialisation and data, unless they are no more than the fewer of either.
    """
    draw = np.random.default_rng(1)

    def group(n: int, sd: float) -> np.ndarray:
        shared = draw.normal(0, 1, (3, 1)) + draw.normal(0, 1, (1, 3))
        return (shared + draw.normal(0, 0.3, (3, 3))).ravel() if crossed else draw.normal(0, sd, n)

    n = None if independent is None else (independent, independent)
    found = [(group(4, 0.6), group(8, 0.2)) for _ in range(1000)]
    tests = [known(statistics.welch(a, b, n)) for a, b in found]
    summaries = [statistics.summarize(a, independent) for a, _ in found]
    assert covered[0] <= np.mean([known(s.low) <= 0 <= known(s.high) for s in summaries]) <= covered[1]
    assert positive[0] <= np.mean([test.p < 0.05 for test in tests]) <= positive[1]
    assert all((test.p < 0.05) == (not test.low <= 0 <= test.high) for test in tests)  # interval and p say the same


def test_welch_and_paired_are_scipys() -> None:
    generator = np.random.default_rng(7)
    a, b = generator.normal(70, 0.6, 4), generator.normal(70.5, 0.2, 8)
    pairs: Any = [(statistics.welch(a, b), stats.ttest_ind(a, b, equal_var=False)),
                  (statistics.paired(a - 69.5), stats.ttest_1samp(a - 69.5, 0))]  # fmt: skip
    for ours, theirs in pairs:
        assert ours.p == pytest.approx(theirs.pvalue)
        assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_welch_finds_what_is_there() -> None:
    found = known(statistics.welch([75.1, 75.3, 74.9, 75.2], [73.0, 73.2, 72.8, 73.1]))
    assert found.estimate == pytest.approx(2.1)
    assert found.p < 1e-4
    # d = 2.1 / 0.170783; Hedges' factor 1 - 3 / (4 * 6 - 1)
    assert found.effect_size == pytest.approx(2.1 / 0.170783 * (1 - 3 / 23), rel=1e-4)


@pytest.mark.parametrize(("sizes", "sds"), [((5, 5), (1, 1)), ((3, 10), (1, 1)), ((4, 4), (0.2, 1.4))])
def test_the_effect_size_has_no_bias(sizes: tuple[int, int], sds: tuple[float, float]) -> None:
    generator = np.random.default_rng(8)
    groups = [(generator.normal(1, sds[0], sizes[0]), generator.normal(0, sds[1], sizes[1])) for _ in range(1000)]
    found = [known(known(statistics.welch(a, b)).effect_size) for a, b in groups]
    true = 1 / float(np.sqrt(np.mean(np.square(sds))))
    assert np.mean(found) == pytest.approx(true, abs=3 * np.std(found) / len(found) ** 0.5 + 0.02)


@pytest.mark.filterwarnings("error")
def test_groups_without_a_spread() -> None:
    """Rounding is no spread either."""
    assert statistics.welch([1, 1], [1, 1]) is None
    assert statistics.welch([2, 2], [1, 1, 1]) is None
    assert statistics.welch([70.1 + 0.2] * 3, [70.3, 0.1 + 70.2, float(np.mean([70.3] * 3))]) is None
    assert statistics.paired([70.3 - 70.0, 71.3 - 71.0, 72.3 - 72.0]) is None
    assert 0 < known(statistics.welch([70.0, 70.4, 70.2], [71.0, 71.0])).p < 0.05


def test_holm_known_answer() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_nothing_and_bonferroni(p: list[float]) -> None:
    adjusted = np.array(statistics.holm(p))
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(len(p) * np.array(p), 1) + 1e-12).all()


def test_holm_keeps_the_familywise_rate() -> None:
    generator = np.random.default_rng(2)
    wrong = sum(min(statistics.holm(generator.uniform(size=6).tolist())) < 0.05 for _ in range(4000))
    assert abs(wrong / 4000 - 0.05) < 0.0105


def counts(generator: np.random.Generator, accuracy: np.ndarray, pixels: int = 400, classes: int = 3) -> np.ndarray:
    """Images whose pixels are right with a probability of their own: (n, 3, C)."""
    n = len(accuracy)
    true = np.full((n, classes), pixels)
    tp = generator.binomial(true, accuracy[:, None])
    predicted = tp + np.roll(true - tp, 1, axis=1)  # what is wrong goes to the next class
    return np.stack([tp, predicted, true], axis=1)


def test_the_bootstrap_over_images_is_paired() -> None:
    """Images differ far more than the networks do; only a paired comparison can see the difference."""
    generator = np.random.default_rng(3)
    hard = generator.uniform(0.3, 0.9, 60)
    better, worse = ([counts(generator, hard + shift) for _ in range(2)] for shift in (0.03, 0.0))
    found = statistics.bootstrap_images(better, worse, resamples=500)
    assert not found.low <= 0 <= found.high
    assert found.low < found.estimate < found.high
    total = [float(np.mean([statistics._miou(run.sum(0).astype(float)) for run in g])) for g in (better, worse)]
    assert found.estimate == pytest.approx(total[0] - total[1])
    assert statistics.bootstrap_images(better, worse, resamples=500) == found  # repeatable
    assert statistics.bootstrap_images(better, better, resamples=100) == Interval(0, 0, 0)


def test_the_bootstrap_covers() -> None:
    generator = np.random.default_rng(4)
    covered = 0
    for repetition in range(150):
        hard = generator.uniform(0.3, 0.9, 40)
        a, b = counts(generator, hard), counts(generator, hard)
        found = statistics.bootstrap_images([a], [b], resamples=300, seed=repetition)
        covered += found.low <= 0 <= found.high
    assert 0.88 <= covered / 150 <= 0.99


def test_classes_that_do_not_occur_do_not_count() -> None:
    run = np.zeros((4, 3, 5), dtype=np.int64)
    run[:, :, 0] = 10, 10, 10
    other = run.copy()
    other[:, 0, 0] = 5
    assert statistics.bootstrap_images([run], [other], resamples=50).estimate == pytest.approx(1 - 5 / 15)


def test_variance_is_split_into_seed_and_repeat() -> None:
    generator = np.random.default_rng(5)
    seeds = generator.normal(0, 0.5, 400)
    found = known(statistics.split_variance([seed + generator.normal(0, 0.2, 3) for seed in seeds]))
    assert found.seed_sd == pytest.approx(0.5, abs=0.04)
    assert found.repeat_sd == pytest.approx(0.2, abs=0.015)
    assert known(found.p) < 1e-6


def test_variance_split_known_answers() -> None:
    # within = (0.02 + 0.02) / 2 = 0.02, between = 2 * 2 * 0.5^2 / 1 = 1, (1 - 0.02) / 2 = 0.49
    found = known(statistics.split_variance([[1.1, 0.9], [2.1, 1.9]]))
    assert (found.seed_sd, found.repeat_sd) == pytest.approx((0.7, 0.02**0.5))
    assert statistics.split_variance([[1, 1], [2, 2]]) == VarianceSplit(seed_sd=0.5**0.5, repeat_sd=0, p=None)
    assert statistics.split_variance([[1.0, 2.0]]) == VarianceSplit(seed_sd=None, repeat_sd=0.5**0.5, p=None)
    assert statistics.split_variance([[1.0], [2.0]]) is None


@pytest.mark.filterwarnings("error")
def test_rounding_is_no_variance() -> None:
    for groups in ([[0.1] * 3, [0.1] * 3], [[70.3] * 3, [70.1 + 0.2] * 3]):
        assert statistics.split_variance(groups) == VarianceSplit(seed_sd=0, repeat_sd=0, p=None)
