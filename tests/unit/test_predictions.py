"""How far predictions are off: learnt, forgotten, and not upset by one stall."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.predictions import STALL, WEIGHT, Spread


@given(st.floats(-10, 10), st.floats(0.1, 5), st.integers(0, 999))
def test_it_learns_where_values_lie_and_few_exceed_the_bound(middle: float, scale: float, seed: int) -> None:
    spread = Spread(mean=0.0, deviation=1.0)
    values = np.random.default_rng(seed).normal(middle, scale, 1000)
    for value in values:
        spread.observe(float(value))
    assert spread.mean == pytest.approx(middle, abs=scale)
    assert spread.deviation == pytest.approx(scale * (2 / np.pi) ** 0.5, rel=0.6)
    assert np.mean(values[500:] > spread.bound) < 0.2


def test_it_can_go_back_to_where_it_began() -> None:
    spread = Spread(mean=1.0, deviation=0.5)
    for _ in range(100):
        spread.observe(1e6)
    for _ in range(1000):
        spread.relax()
    assert (spread.mean, spread.deviation) == (pytest.approx(1.0), pytest.approx(0.5))


@given(st.floats(1, 1e9))
def test_one_stall_moves_it_by_little(stall: float) -> None:
    spread = Spread(mean=0.0, deviation=1.0)
    spread.observe(stall)
    assert 0 < spread.mean <= WEIGHT * STALL
    assert spread.deviation <= 1 + WEIGHT * STALL


def test_values_that_were_long_alike_do_not_blind_it() -> None:
    spread = Spread(mean=0.0, deviation=1.0)
    for _ in range(2000):
        spread.observe(0.0)
    assert spread.bound < 1e-9
    for _ in range(20):
        spread.observe(5.0)
    assert spread.bound > spread.first_bound
