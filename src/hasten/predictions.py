"""Predictions that learn: what they are of, and how far they are usually off."""

from __future__ import annotations

from typing import Protocol

WEIGHT = 0.05  # of a new value
DEVIATIONS = 3.0  # mean absolute ones; beyond them lies less than 1 % of a normal distribution
STALL = 10.0  # deviations at which a value is cut: one stall must not close the door on everybody


class Costs(Protocol):
    """Predicts what `compute` takes; see `hasten.costs`."""

    def seconds(self, rows: int, tokens: int, /) -> float:
        """What a batch takes on average."""
        ...

    def bound(self, rows: int, tokens: int, /) -> float:
        """What it seldom exceeds."""
        ...

    def observe(self, rows: int, tokens: int, seconds: float, /) -> None:
        """Learns what one took."""
        ...

    def at_start(self, seconds: float, /) -> float:
        """What was known at first of what is now predicted to take so long."""
        ...

    def relax(self) -> None:
        """Goes a step back to what was known at first."""
        ...


class NoCosts:
    """Knows nothing: every batch is free, and no deadline is in danger before it has passed."""

    def seconds(self, _rows: int, _tokens: int, /) -> float:
        """Nothing."""
        return 0.0

    def bound(self, _rows: int, _tokens: int, /) -> float:
        """Nothing."""
        return 0.0

    def observe(self, _rows: int, _tokens: int, _seconds: float, /) -> None:
        """Ignores it."""

    def at_start(self, seconds: float, /) -> float:
        """The same."""
        return seconds

    def relax(self) -> None:
        """Never knew more."""


class Spread:
    """Where values lie lately, forgetting the old ones.

    Attributes:
        mean: Their mean.
        deviation: Their mean absolute deviation.
    """

    def __init__(self, *, mean: float, deviation: float) -> None:
        """Starts from an assumption.

        Args:
            mean: The mean to begin with.
            deviation: The mean absolute deviation to begin with, above 0.
        """
        self.mean, self.deviation = self._first = (mean, deviation)

    @property
    def bound(self) -> float:
        """What few of them exceed."""
        return self.mean + DEVIATIONS * self.deviation

    @property
    def first_mean(self) -> float:
        """The mean that it started from."""
        return self._first[0]

    @property
    def first_bound(self) -> float:
        """`bound`, by the assumption that it started from."""
        mean, deviation = self._first
        return mean + DEVIATIONS * deviation

    def observe(self, value: float) -> None:
        """Learns one value."""
        most = STALL * max(self.deviation, self._first[1])  # values that were alike must not blind it to others
        off = max(-most, min(value - self.mean, most))
        self.deviation += WEIGHT * (abs(off) - self.deviation)
        self.mean += WEIGHT * off

    def relax(self) -> None:
        """Goes a step back to the first assumption, for where nothing can be learnt since nothing is tried."""
        mean, deviation = self._first
        self.mean += WEIGHT * (mean - self.mean)
        self.deviation += WEIGHT * (deviation - self.deviation)
