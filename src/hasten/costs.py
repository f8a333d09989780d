"""What an inference costs: seconds by rows and padded tokens, measured at start and corrected by every batch since.

A transformer's inference takes a while whatever it is given, a time for each token (its products), and one for each
pair of tokens of a row (its attention): t(rows, tokens) = a + b · rows · tokens + c · rows · tokens². The three are
fitted to a few shapes, with none below 0. What this machine does under traffic differs from what it did when idle, so
every batch moves a factor on t, and the spread of that factor makes the bound.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from hasten.predictions import Spread
from hasten.runtime import Runtime
from hasten.tokenization import Encoding

SHAPES_TOKENS = (8, 32, 128, 512)
RUNS, SHAPE_BUDGET_S = 5, 0.25
LEAST_SPREAD = 0.05
WARM_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One inference that was timed.

    Attributes:
        rows: Rows of the batch.
        tokens: Its length, padding included.
        seconds: What it took.
    """

    rows: int
    tokens: int
    seconds: float


class CostModel:
    """Predicts inferences of one variant on this machine; not to be called from several threads at once."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        """Fits the surface.

        Args:
            samples: Timed inferences, at least one, of seconds above 0.
        """
        from scipy.optimize import nnls

        taken = np.array([sample.seconds for sample in samples])
        terms = np.array([_terms(sample.rows, sample.tokens) for sample in samples])
        weights: NDArray[np.float64] = nnls(terms / taken[:, None], np.ones(len(taken)))[0]
        self._start_s, self._token_s, self._pair_s = weights.tolist()
        ratios = taken / (terms @ weights)
        middle = float(np.median(ratios))
        self._factor = Spread(mean=middle, deviation=max(LEAST_SPREAD, float(np.abs(ratios - middle).mean())))

    def seconds(self, rows: int, tokens: int) -> float:
        """What an inference takes on average.

        Args:
            rows: Rows of the batch, at least 1.
            tokens: Its length, padding included, at least 1.

        Returns:
            Seconds.
        """
        return self._factor.mean * self._surface(rows, tokens)

    def bound(self, rows: int, tokens: int) -> float:
        """What it seldom exceeds; arguments and unit as of `seconds`."""
        return self._factor.bound * self._surface(rows, tokens)

    def longest_within(self, seconds: float, most: int) -> int:
        """The longest single row that seldom takes longer.

        Args:
            seconds: How long it may take.
            most: Longest there is, in tokens.

        Returns:
            Tokens; 0 if not even one is that fast.
        """
        return bisect_right(range(1, most + 1), seconds, key=lambda tokens: self.bound(1, tokens))

    def observe(self, rows: int, tokens: int, seconds: float) -> None:
        """Learns what one took; arguments as of `seconds`."""
        self._factor.observe(seconds / self._surface(rows, tokens))

    def at_start(self, seconds: float) -> float:
        """What the measurement at start says of what is now predicted to take so many seconds."""
        return seconds * self._factor.first_mean / self._factor.mean

    def relax(self) -> None:
        """Goes a step back to what was measured at start."""
        self._factor.relax()

    def _surface(self, rows: int, tokens: int) -> float:
        # Asked several times a request, where an array of three would cost more than the sum.
        return self._start_s + rows * tokens * (self._token_s + tokens * self._pair_s)


def _terms(rows: int, tokens: int) -> tuple[int, int, int]:
    return 1, rows * tokens, rows * tokens**2


def measure_costs(runtime: Runtime, *, max_tokens: int, max_batch: int, max_padded_tokens: int) -> CostModel:
    """Times inferences of several shapes, which warms the runtime up as well.

    Args:
        runtime: What to run.
        max_tokens: Longest input.
        max_batch: Most rows of a batch.
        max_padded_tokens: Highest rows × tokens of a batch of several rows.

    Returns:
        The fitted surface.
    """
    samples: list[Sample] = []
    for wanted in SHAPES_TOKENS:
        row = runtime.encode(["a " * min(wanted, max_tokens)])[0]
        largest = min(max_batch, max(1, max_padded_tokens // len(row)))
        for rows in sorted({1, max(1, largest // 2), largest}):
            samples += _timed(runtime, [row] * rows)
    return CostModel(samples)


def warm_every_length(runtime: Runtime, *, max_tokens: int) -> int:
    """Runs a text of each length, for a runtime that compiles what it has not seen; for a minute at most.

    Args:
        runtime: What to run.
        max_tokens: Longest input.

    Returns:
        The longest that was run.
    """
    began, longest = perf_counter(), 0
    for words in range(1, max_tokens + 1):
        row = runtime.encode([" ".join(["a"] * words)])
        runtime.infer(row)
        longest = len(row[0])
        if longest >= max_tokens or perf_counter() - began > WARM_S:
            break
    return longest


def _timed(runtime: Runtime, batch: list[Encoding]) -> list[Sample]:
    """Some runs after one that does not count."""
    runtime.infer(batch)
    began, samples = perf_counter(), list[Sample]()
    while len(samples) < RUNS and perf_counter() - began < SHAPE_BUDGET_S:
        started = perf_counter()
        runtime.infer(batch)
        samples.append(Sample(rows=len(batch), tokens=len(batch[0]), seconds=perf_counter() - started))
    return samples
