"""A short form of `benchmarks/interval_coverage.py`: intervals hold the truth about as often as they say.

The bounds are loose: of 400 runs, a share of 5 % or 95 % has a standard error of 1.1 points.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from hasten.intervals import (
    ONE_SIDED,
    Interval,
    median_ratio,
    paired_ratio,
    percentile,
    percentile_bounds,
    percentile_effect,
)

RUNS = 400
SHARED_ERRORS = 0.8
NOISE = 2 * math.sqrt(0.05 * 0.95 / RUNS)


def holds(interval: Interval, truth: float) -> bool:
    low = -math.inf if interval.lower is None else interval.lower
    return low - 1e-12 <= truth <= (math.inf if interval.upper is None else interval.upper) + 1e-12


def paired_answers(generator: np.random.Generator, rows: int, accuracy: float, retention: float) -> list[np.ndarray]:
    """Answers of a variant and its baseline of known accuracies, most of whose errors are the same."""
    gained = (1 - accuracy) * (1 - SHARED_ERRORS)
    both = retention * accuracy - gained
    kinds = generator.choice(4, rows, p=[both, gained, accuracy - both, (1 - accuracy) * SHARED_ERRORS])
    return [kinds < 2, (kinds == 0) | (kinds == 2)]


@pytest.mark.parametrize(("rows", "accuracy", "retention"), [(300, 0.8, 0.95), (1000, 0.92, 0.98), (2000, 0.97, 0.99)])
def test_retention_intervals_hold_the_truth(rows: int, accuracy: float, retention: float) -> None:
    generator = np.random.default_rng(rows)
    runs = [paired_answers(generator, rows, accuracy, retention) for _ in range(RUNS)]
    two_sided = np.mean([holds(paired_ratio(new, base), retention) for new, base in runs])
    bounds = [paired_ratio(new, base, level=ONE_SIDED) for new, base in runs]
    assert 0.92 <= two_sided <= 0.98
    assert np.mean([bound.lower <= retention for bound in bounds]) >= 0.91
    assert np.mean([bound.upper >= retention for bound in bounds]) >= 0.91


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator, size: generator.lognormal(2, 0.5, size),
        lambda generator, size: generator.gamma(4, 5, size),
        lambda generator, size: np.where(generator.random(size) < 0.02, 60, 15) * generator.lognormal(0, 0.2, size),
    ],
    ids=["lognormal", "gamma", "bimodal"],
)
@pytest.mark.parametrize("samples", [300, 1000])
def test_p99_intervals_hold_the_truth(samples: int, draw: Callable[[np.random.Generator, int], np.ndarray]) -> None:
    generator = np.random.default_rng(samples)
    truth = float(np.percentile(draw(generator, 4_000_000), 99))
    runs = [draw(generator, samples) for _ in range(RUNS)]
    bounds = [percentile_bounds(run, 99) for run in runs]
    assert 0.92 <= np.mean([holds(percentile(run, 99), truth) for run in runs]) <= 0.98
    assert np.mean([bound.upper >= truth for bound in bounds]) >= 0.92
    assert np.mean([bound.lower <= truth for bound in bounds]) >= 0.92


def a_machine_of_two_speeds(generator: np.random.Generator, size: int) -> np.ndarray:
    """Latencies that take half as long again in stretches of some 20 requests."""
    ends = np.cumsum(generator.geometric(1 / 20, size))
    slow = (np.searchsorted(ends, np.arange(size), side="right") + generator.integers(2)) % 2 == 1
    return generator.lognormal(2, 0.3, size) * np.where(slow, 1.5, 1.0)


@pytest.mark.parametrize("q", [50.0, 95.0, 99.0])
def test_percentile_intervals_hold_the_truth_where_the_machine_has_two_speeds(q: float) -> None:
    generator = np.random.default_rng(int(q))
    truth = float(np.percentile(a_machine_of_two_speeds(generator, 2_000_000), q))
    runs = [a_machine_of_two_speeds(generator, 1000) for _ in range(RUNS)]
    alike = np.mean([holds(percentile(run, q, effect=percentile_effect(run, q)), truth) for run in runs])
    independent = np.mean([holds(percentile(run, q), truth) for run in runs])
    assert alike >= 0.88
    assert independent < alike


@pytest.mark.parametrize(("rows", "accuracy"), [(300, 0.92), (1000, 0.8), (1000, 0.97)])
def test_equal_variants_seldom_differ_in_accuracy(rows: int, accuracy: float) -> None:
    generator = np.random.default_rng(2)
    runs = [paired_ratio(*paired_answers(generator, rows, accuracy, 1.0)) for _ in range(RUNS)]
    assert np.mean([not holds(run, 1.0) for run in runs]) <= 0.05 + NOISE


def test_equal_variants_seldom_differ_in_speed() -> None:
    generator, differ = np.random.default_rng(4), 0
    for _ in range(RUNS // 4):
        texts = generator.lognormal(2, 0.4, 120)
        base, new = (texts * generator.lognormal(0, 0.1, 120) for _ in range(2))
        differ += not holds(median_ratio(base.tolist(), new.tolist()), 1.0)
    assert differ <= 0.05 * (RUNS // 4)


def test_a_variant_with_itself_never_differs() -> None:
    generator = np.random.default_rng(3)
    for _ in range(50):
        right = generator.random(300) < 0.9
        taken = generator.lognormal(2, 0.4, 60).tolist()
        itself, speed = paired_ratio(right, right), median_ratio(taken, taken)
        assert itself.value == 1
        assert holds(itself, 1.0)
        assert (speed.lower, speed.value, speed.upper) == (1, 1, 1)
