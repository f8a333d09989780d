"""What inferences cost: a surface that is known, and one that is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.costs import CostModel, Sample, measure_costs
from hasten.runtime import FakeRuntime, Logits
from hasten.tokenization import Encoding

SHAPES = [(rows, tokens) for tokens in (8, 32, 128, 512) for rows in (1, 4, 8)]
START_S = st.floats(1e-4, 1e-2)
TOKEN_S = st.floats(1e-6, 1e-3)
PAIR_S = st.floats(0, 1e-6)


def known(start_s: float, token_s: float, pair_s: float) -> list[Sample]:
    return [
        Sample(rows=rows, tokens=n, seconds=start_s + token_s * rows * n + pair_s * rows * n**2) for rows, n in SHAPES
    ]


@given(START_S, TOKEN_S, PAIR_S, st.integers(1, 8), st.integers(1, 512))
def test_a_known_surface_is_found(start_s: float, token_s: float, pair_s: float, rows: int, tokens: int) -> None:
    model = CostModel(known(start_s, token_s, pair_s))
    truth = start_s + token_s * rows * tokens + pair_s * rows * tokens**2
    assert model.seconds(rows, tokens) == pytest.approx(truth, rel=1e-3)
    assert model.bound(rows, tokens) > model.seconds(rows, tokens)


@given(START_S, TOKEN_S, PAIR_S, st.floats(0, 1), st.integers(1, 512))
def test_the_longest_that_fits_does_and_the_next_does_not(
    start_s: float, token_s: float, pair_s: float, seconds: float, most: int
) -> None:
    model = CostModel(known(start_s, token_s, pair_s))
    longest = model.longest_within(seconds, most)
    assert longest == 0 or model.bound(1, longest) <= seconds
    assert longest == most or model.bound(1, longest + 1) > seconds


def test_it_follows_a_machine_that_became_slower_and_forgives_one_stall() -> None:
    model = CostModel(known(1e-3, 1e-4, 0))
    truth = model.seconds(1, 32)
    model.observe(1, 32, 100 * truth)
    assert model.seconds(1, 32) < 1.2 * truth
    for _ in range(200):
        model.observe(1, 32, 2 * truth)
    assert model.seconds(4, 64) == pytest.approx(2 * (1e-3 + 1e-4 * 256), rel=0.02)
    assert 2 * truth < model.bound(1, 32) < 2.5 * truth


@dataclass(frozen=True, slots=True)
class Slow:
    """Takes a millisecond and one more for each 64 tokens of its batch."""

    labels: tuple[str, ...] = ("negative", "positive")
    clock: list[float] = field(default_factory=lambda: [0.0])

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        return FakeRuntime().encode(texts)

    def infer(self, encodings: Sequence[Encoding]) -> Logits:
        self.clock.append(self.clock[-1] + 1e-3 + 1e-3 * len(encodings) * max(map(len, encodings)) / 64)
        return FakeRuntime().infer(encodings)


def test_a_runtime_is_measured_over_the_shapes_that_it_will_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Slow()
    monkeypatch.setattr("hasten.costs.perf_counter", lambda: runtime.clock[-1])
    model = measure_costs(runtime, max_tokens=128, max_batch=4, max_padded_tokens=256)
    assert model.seconds(2, 96) == pytest.approx(4e-3, rel=1e-3)
    assert model.seconds(1, 256) == pytest.approx(5e-3, rel=1e-3)


def test_what_was_learnt_is_told_from_what_was_known_at_start_and_given_up_step_by_step() -> None:
    model = CostModel(known(1e-3, 1e-4, 0))
    first = model.seconds(2, 64)
    for _ in range(400):
        model.observe(2, 64, 3 * first)
    assert model.seconds(2, 64) == pytest.approx(3 * first, rel=0.02)
    assert model.at_start(model.seconds(2, 64)) == pytest.approx(first)
    for _ in range(1000):
        model.relax()
    assert model.seconds(2, 64) == pytest.approx(first, rel=1e-3)
