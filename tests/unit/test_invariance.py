"""Batch invariance, on runtimes whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from hasten.errors import DataError
from hasten.invariance import TOLERANCE, batch_invariance
from hasten.runtime import FakeRuntime, Logits
from hasten.tokenization import Encoding

TEXTS = [f"text number {number}" for number in range(21)]


@dataclass(frozen=True, slots=True)
class Leaky:
    """Adds to each logit of the first label a little for every other text, or for a longest mate above a length."""

    leak: float
    above_tokens: int = 0
    labels: tuple[str, ...] = ("negative", "positive")

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        return FakeRuntime().encode(texts)

    def infer(self, encodings: Sequence[Encoding]) -> Logits:
        logits = FakeRuntime().infer(encodings)
        if len(encodings) > 1 and max(map(len, encodings)) > self.above_tokens:
            logits[:, 0] += self.leak
        return logits


def test_answers_that_do_not_depend_on_company_are_invariant() -> None:
    found = batch_invariance(FakeRuntime(), TEXTS)
    assert (found.holds, found.label_flips, found.max_logit_difference, found.texts) == (True, 0, 0.0, 21)


@pytest.mark.parametrize("above_tokens", [0, 200])
def test_answers_that_depend_on_company_are_not(above_tokens: int) -> None:
    """Above 200 tokens there are only the adversarial mates."""
    found = batch_invariance(Leaky(0.25, above_tokens), TEXTS)
    assert not found.holds
    assert found.max_logit_difference == pytest.approx(0.25, abs=1e-6)


def test_flips_are_counted_and_tiny_moves_are_allowed() -> None:
    assert batch_invariance(Leaky(3.0), TEXTS).label_flips > 0
    tiny = batch_invariance(Leaky(TOLERANCE / 2), TEXTS)
    assert tiny.holds
    assert 0 < tiny.max_logit_difference < TOLERANCE


def test_no_number_in_company_is_no_invariance() -> None:
    found = batch_invariance(Leaky(float("nan")), TEXTS)
    assert not found.holds
    assert np.isnan(found.max_logit_difference)


def test_it_needs_texts() -> None:
    with pytest.raises(DataError, match="none were given"):
        batch_invariance(FakeRuntime(), [])
    assert np.isfinite(batch_invariance(FakeRuntime(), ["one"]).max_logit_difference)
