"""Intervals against SciPy, against the order statistics themselves, and what every interval must hold to."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hasten.intervals import (
    Interval,
    design_effect,
    mean,
    median_ratio,
    paired_ratio,
    percentile,
    percentile_bounds,
    percentile_effect,
    proportion,
    stretch,
)

LEVELS = (0.8, 0.9, 0.95, 0.99)
ROOM = 1e-12


def answers(both: int, gained: int, lost: int, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Whether each row is right under the new model and under the baseline."""
    new = [True] * (both + gained) + [False] * (lost + neither)
    base = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return np.asarray(new), np.asarray(base)


def holds(interval: Interval, value: float) -> bool:
    low = -math.inf if interval.lower is None else interval.lower
    high = math.inf if interval.upper is None else interval.upper
    return low - ROOM <= value <= high + ROOM


def within(inner: Interval, outer: Interval) -> bool:
    """Whether one interval lies in another; a missing limit is infinitely far."""
    lows = [-math.inf if i.lower is None else i.lower for i in (outer, inner)]
    highs = [math.inf if i.upper is None else i.upper for i in (inner, outer)]
    return lows[0] <= lows[1] + ROOM and highs[0] <= highs[1] + ROOM


@pytest.mark.parametrize(("successes", "total"), [(0, 1), (1, 1), (0, 300), (300, 300), (1, 50), (970, 1000)])
@pytest.mark.parametrize("level", LEVELS)
def test_proportion_solves_wilsons_equation(successes: int, total: int, level: float) -> None:
    found = proportion(successes, total, level=level)
    z, share = stats.norm.ppf((1 + level) / 2), successes / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    assert found.value == share
    assert found.lower == pytest.approx(max(0, middle - half), abs=1e-9)
    assert found.upper == pytest.approx(min(1, middle + half), abs=1e-9)


@given(st.data(), st.integers(1, 2000), st.sampled_from(list(pairwise(LEVELS))))
@settings(max_examples=50)
def test_proportion_holds_its_estimate_and_widens_with_the_level(
    data: st.DataObject, total: int, levels: tuple[float, float]
) -> None:
    successes = data.draw(st.integers(0, total))
    narrow, wide = (proportion(successes, total, level=level) for level in levels)
    assert holds(narrow, narrow.value)
    assert within(narrow, wide)
    assert wide.upper - wide.lower > narrow.upper - narrow.lower
    assert 0 <= wide.lower <= wide.upper <= 1


cells = st.tuples(st.integers(1, 400), st.integers(0, 40), st.integers(0, 40), st.integers(0, 100))


@given(cells, st.sampled_from(list(pairwise(LEVELS))))
@settings(max_examples=80)
def test_a_ratio_holds_its_estimate_and_widens_with_the_level(
    table: tuple[int, int, int, int], levels: tuple[float, float]
) -> None:
    new, base = answers(*table)
    narrow, wide = (paired_ratio(new, base, level=level) for level in levels)
    assert narrow.value == pytest.approx(new.sum() / base.sum())
    assert holds(narrow, narrow.value)
    assert within(narrow, wide)
    assert narrow.lower > 0


@given(st.integers(1, 3000), st.integers(0, 3000))
@settings(max_examples=50)
def test_a_variant_with_itself_retains_everything(right: int, wrong: int) -> None:
    new, base = answers(right, 0, 0, wrong)
    found = paired_ratio(new, base)
    assert found.value == 1
    assert found.lower < 1 < found.upper or found.lower <= 1 <= found.upper


@given(cells)
@settings(max_examples=50)
def test_the_other_way_round_a_ratio_is_its_inverse(table: tuple[int, int, int, int]) -> None:
    new, base = answers(*table)
    there, back = paired_ratio(new, base), paired_ratio(base, new)
    assert there.value * back.value == pytest.approx(1)
    assert there.lower * back.upper == pytest.approx(1, rel=1e-6)
    assert there.upper * back.lower == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("table", "limits"),
    [((59, 6, 16, 80), (0.8667, 0.7476, 0.9876)), ((1, 1, 7, 12), (0.25, 0.0653, 0.9069))],
    ids=["complete response, Cavo et al. 2012", "hyper-responsiveness, Bentur et al. 2009"],
)
def test_a_ratio_is_that_of_published_examples(
    table: tuple[int, int, int, int], limits: tuple[float, float, float]
) -> None:
    """Both stand in chapter 8 of Fagerland, Lydersen and Laake 2017, "Statistical Analysis of Contingency Tables"."""
    found = paired_ratio(*answers(*table))
    assert (found.value, found.lower, found.upper) == pytest.approx(limits, abs=5e-5)


def test_the_order_of_the_rows_does_not_matter() -> None:
    new, base = answers(700, 20, 30, 50)
    order = np.random.default_rng(0).permutation(len(new))
    assert paired_ratio(new[order], base[order]) == paired_ratio(new, base)


def test_a_ratio_on_many_rows_is_that_of_the_delta_method() -> None:
    both, gained, lost, neither = 85_000, 2_000, 3_000, 10_000
    found = paired_ratio(*answers(both, gained, lost, neither))
    ratio = (both + gained) / (both + lost)
    spread = math.sqrt((gained + lost) / ((both + gained) * (both + lost)))
    z = stats.norm.ppf(0.975)
    assert found.lower == pytest.approx(ratio * math.exp(-z * spread), abs=2e-5)
    assert found.upper == pytest.approx(ratio * math.exp(z * spread), abs=2e-5)


def test_more_rows_give_a_narrower_ratio() -> None:
    widths = []
    for times in (1, 4, 16):
        found = paired_ratio(*answers(270 * times, 5 * times, 8 * times, 17 * times))
        widths.append(found.upper - found.lower)
    assert widths[0] > 1.7 * widths[1] > 2.8 * widths[2]


def test_a_variant_that_is_never_right_retains_nothing() -> None:
    found = paired_ratio(*answers(0, 0, 200, 10))
    assert found.value == 0
    assert found.lower == pytest.approx(0, abs=1e-9)
    assert 0 < found.upper < 0.1


@pytest.mark.parametrize("q", [5.0, 50.0, 90.0, 99.0])
@pytest.mark.parametrize("samples", [10, 60, 299, 1000])
def test_the_bounds_of_a_percentile_are_scipys(q: float, samples: int) -> None:
    taken = np.random.default_rng(samples).lognormal(2, 0.5, samples)
    found = percentile_bounds(taken, q)
    below = stats.quantile_test(taken, p=q / 100, alternative="greater").confidence_interval(0.95).low
    above = stats.quantile_test(taken, p=q / 100, alternative="less").confidence_interval(0.95).high
    assert found.value == np.percentile(taken, q)
    assert found.lower == (None if math.isnan(below) else below)
    assert found.upper == (None if math.isnan(above) else above)


@pytest.mark.parametrize("samples", [20, 100, 299, 1000])
@pytest.mark.parametrize("q", [50.0, 99.0])
def test_the_bounds_of_a_percentile_are_the_tightest_that_cover(samples: int, q: float) -> None:
    found = percentile_bounds(np.arange(1.0, samples + 1), q)
    below = stats.binom(samples, q / 100)  # how many samples lie at or below the true percentile
    covering_above = [rank for rank in range(1, samples + 1) if below.cdf(rank - 1) >= 0.95]
    covering_below = [rank for rank in range(1, samples + 1) if below.sf(rank - 1) >= 0.95]
    assert found.upper == (covering_above[0] if covering_above else None)
    assert found.lower == (covering_below[-1] if covering_below else None)


@pytest.mark.parametrize("q", [50.0, 95.0, 99.0])
@pytest.mark.parametrize("samples", [299, 400, 750, 1000, 3000])
def test_a_two_sided_percentile_covers_95_to_97_percent_by_the_binomial(samples: int, q: float) -> None:
    found = percentile(np.arange(1.0, samples + 1), q)
    below = stats.binom(samples, q / 100)
    assert 0.95 <= below.cdf(found.upper - 1) - below.cdf(found.lower - 1) <= 0.97


@pytest.mark.parametrize("samples", [1, 20, 298])
def test_a_two_sided_p99_needs_299_samples(samples: int) -> None:
    found = percentile(np.arange(1.0, samples + 1), 99)
    assert (found.lower, found.upper) == (None, None)


@given(st.lists(st.floats(0.1, 1e4), min_size=3, max_size=400), st.sampled_from([50.0, 90.0, 99.0]))
@settings(max_examples=50)
def test_a_percentile_holds_its_estimate_and_scales_with_the_unit(samples: list[float], q: float) -> None:
    taken = np.asarray(samples)
    found, thousandfold = percentile(taken, q), percentile(taken * 1024, q)
    assert holds(found, found.value)
    assert thousandfold.lower == (None if found.lower is None else pytest.approx(found.lower * 1024))
    assert thousandfold.upper == (None if found.upper is None else pytest.approx(found.upper * 1024))


@pytest.mark.parametrize(("samples", "exists"), [(298, False), (299, True)])
def test_the_upper_bound_of_p99_needs_299_samples(samples: int, exists: bool) -> None:
    taken = np.random.default_rng(1).gamma(4, 5, samples)
    found = percentile_bounds(taken, 99)
    assert (found.upper is not None) is exists
    assert found.upper in (None, taken.max())
    assert (0.99**samples <= 0.05) is exists


@given(st.integers(6, 3000), st.floats(1, 40), st.sampled_from([5.0, 50.0, 95.0]), st.integers(0, 9))
@settings(max_examples=80)
def test_samples_that_are_alike_bound_less(n: int, effect: float, q: float, seed: int) -> None:
    taken, worth = np.random.default_rng(seed).lognormal(2, 0.5, n), max(1, int(n / effect))
    for interval in (percentile, percentile_bounds):
        alike, independent = interval(taken, q, effect=effect), interval(taken[:worth], q)
        assert holds(alike, alike.value)
        assert (alike.lower is None, alike.upper is None) == (independent.lower is None, independent.upper is None)
    found, ordered, within_q = percentile_bounds(taken, q, effect=effect), np.sort(taken), stats.binom(worth, q / 100)
    if found.upper is not None:  # the first rank that covers, and no more than one of the worth above it
        share = np.searchsorted(ordered, found.upper, side="right") / n
        assert -1e-9 <= share - (within_q.ppf(0.95) + 1) / worth <= 1 / n + 1e-9
    if found.lower is not None:
        share = np.searchsorted(ordered, found.lower, side="right") / n
        assert -1e-9 <= (within_q.ppf(0.05)) / worth - share + 1 / n <= 1 / worth + 1 / n + 1e-9


def test_a_design_effect_is_what_repeating_makes_of_independent_samples() -> None:
    generator = np.random.default_rng(0)
    independent = generator.normal(size=40_000)
    assert 1 <= design_effect(independent) < 1.3
    assert design_effect(np.repeat(independent[:4000], 10)) == pytest.approx(10, rel=0.25)
    assert percentile_effect(np.repeat(independent[:4000], 10), 95) == pytest.approx(10, rel=0.25)
    assert design_effect(np.tile([1.0, 2.0], 500)) == 1  # each makes up for the one before it
    assert design_effect(np.full(100, 3.0)) == 1
    assert [design_effect(np.array([3.0, 4.0, 9.0])[:n]) for n in (1, 2, 3)] == pytest.approx([1, 1, 1])


def test_a_design_effect_of_independent_samples_is_right_on_average() -> None:
    """Over all orders of some samples the variance of a stretch's sum is that of drawing without replacement."""
    generator, taken = np.random.default_rng(6), np.random.default_rng(7).lognormal(0, 1, 400)
    apart = taken - taken.mean()
    length, found = stretch(400, turns=2), list[float]()
    for _ in range(4000):
        order = generator.permutation(apart)
        found.append(float(order[:length].sum() ** 2) / (length * taken.var()) * 399 / (400 - length))
    assert np.mean(found) == pytest.approx(1, abs=0.08)
    unclamped = [design_effect(generator.permutation(taken)) for _ in range(500)]
    assert 1 <= np.mean(unclamped) < 1.25


def test_a_design_effect_is_that_of_batch_means_of_an_autoregression() -> None:
    """The variance of its mean is (1 + r) / (1 - r) times that of independent samples."""
    noise, taken = np.random.default_rng(1).normal(size=200_000), np.zeros(200_000)
    for at in range(1, len(taken)):
        taken[at] = 0.8 * taken[at - 1] + noise[at]
    assert design_effect(taken) == pytest.approx(9, rel=0.15)


@pytest.mark.parametrize(
    ("n", "one", "two"), [(1, 1, 1), (199, 14, 14), (200, 25, 14), (400, 25, 50), (1000, 50, 50), (4500, 75, 75)]
)
def test_a_stretch_is_the_square_root_of_all_in_whole_turns(n: int, one: int, two: int) -> None:
    assert (stretch(n), stretch(n, turns=2)) == (one, two)


def test_a_proportion_of_rows_that_are_alike_is_that_of_fewer() -> None:
    alike, fewer = proportion(40, 1000, effect=4), proportion(10, 250)
    assert (alike.value, alike.lower, alike.upper) == pytest.approx((0.04, fewer.lower, fewer.upper))
    uppers = [proportion(7, 1000, effect=effect).upper for effect in np.linspace(1, 9, 50)]
    assert all(low < high for low, high in pairwise(uppers))


@pytest.mark.parametrize(("successes", "total"), [(0, 7), (3, 7), (7, 7), (499, 1000)])
def test_a_proportion_is_scipys(successes: int, total: int) -> None:
    theirs, ours = stats.binomtest(successes, total).proportion_ci(0.95, "wilson"), proportion(successes, total)
    assert (ours.lower, ours.upper) == pytest.approx((theirs.low, theirs.high))


def test_a_ratio_of_medians_resamples_stretches() -> None:
    generator = np.random.default_rng(5)
    base = generator.lognormal(3, 0.1, 1000)
    new = base * np.repeat(generator.choice([0.2, 0.3], 40), 25)
    together, order = median_ratio(base.tolist(), new.tolist()), generator.permutation(1000)
    shuffled = median_ratio(base[order].tolist(), new[order].tolist())
    assert together.value == shuffled.value
    assert together.upper - together.lower > 2 * (shuffled.upper - shuffled.lower)


def test_equal_samples_bound_themselves() -> None:
    assert percentile(np.full(500, 7.0), 99) == Interval(value=7.0, lower=7.0, upper=7.0)


def test_mean_is_students() -> None:
    taken = np.random.default_rng(2).gamma(4, 5, 80)
    found = mean(taken, level=0.9)
    low, high = stats.ttest_1samp(taken, 0).confidence_interval(0.9)
    assert (found.value, found.lower, found.upper) == pytest.approx((taken.mean(), low, high))
    alike = mean(taken, level=0.9, effect=4)
    fewer = stats.t.interval(0.9, 19, loc=taken.mean(), scale=2 * stats.sem(taken))
    assert (alike.value, alike.lower, alike.upper) == pytest.approx((taken.mean(), *fewer))
    assert mean(np.full(5, 3.0)) == Interval(value=3.0, lower=3.0, upper=3.0)


def test_a_ratio_of_medians_of_paired_samples_is_tight_and_the_same_again() -> None:
    base = np.random.default_rng(3).lognormal(3, 0.7, 200)
    exact = median_ratio(base.tolist(), (base / 4).tolist())
    assert (exact.value, exact.lower, exact.upper) == pytest.approx((4, 4, 4))
    new = base / 4 * np.random.default_rng(4).lognormal(0, 0.1, 200)
    noisy = median_ratio(base.tolist(), new.tolist())
    assert noisy == median_ratio(base.tolist(), new.tolist())
    assert noisy.lower < noisy.value < noisy.upper
    assert noisy.value == np.median(base) / np.median(new)
    assert within(median_ratio(base.tolist(), new.tolist(), level=0.9), noisy)


def test_a_ratio_of_medians_of_one_pair_has_no_limits() -> None:
    assert median_ratio([8.0], [2.0]) == Interval(value=4.0, lower=None, upper=None)
