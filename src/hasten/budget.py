"""The promise and the judgement: does a measured variant meet the budget, miss it, or can the data not say?

A criterion is *met* when the one-sided 95 % bound of what was measured meets its limit, *missed* when the opposite
bound fails it, *undecided* in between. `gate="point"` judges by the estimate alone, and still leaves a p99 on fewer
than 299 samples undecided: below that no sample bounds the 99th percentile. Samples that are alike, since they were
taken one after the other, count as fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hasten.errors import UsageError
from hasten.intervals import ONE_SIDED, Interval, percentile_effect
from hasten.measurement import Measurement, check_same_run, speedup

Verdict = Literal["met", "missed", "undecided"]
Gate = Literal["bound", "point"]
P99_MIN_SAMPLES = 299
ONE_SIDED_QUANTILE = 1.6448536269514722


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a served model must keep to.

    Attributes:
        p99_ms: Highest 99th percentile of latency, in milliseconds; None asks for none.
        speedup: Lowest ratio of the baseline's median latency to the variant's; None asks for none.
        retain: Lowest share of the baseline's accuracy to keep, above 0 and at most 1.
        gate: Whether the one-sided 95 % bound or the estimate must meet each limit.
    """

    p99_ms: float | None = None
    speedup: float | None = None
    retain: float = 0.98
    gate: Gate = "bound"

    def __post_init__(self) -> None:
        """Checks the limits.

        Raises:
            UsageError: A limit is missing or out of range.
        """
        if self.p99_ms is None and self.speedup is None:
            raise UsageError("a budget needs a latency: --p99-ms, --speedup, or both")
        for name, value in (("--p99-ms", self.p99_ms), ("--speedup", self.speedup)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be a number above 0, not {value}")
        if not 0 < self.retain <= 1:
            raise UsageError(
                f"--retain is a share of the baseline's accuracy, above 0 and at most 1, not {self.retain}"
            )
        if self.gate not in ("bound", "point"):
            raise UsageError(f"--gate is 'bound' or 'point', not {self.gate!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """How a variant stands against one criterion.

    Attributes:
        criterion: `p99_ms`, `speedup` or `retention`.
        verdict: Met, missed or undecided.
        passes: Whether the estimate alone meets the limit.
        reason: One sentence with the figures.
        needed: Number of rows or samples that would decide it if the estimate stays; None where no number would
            or none is needed.
    """

    criterion: str
    verdict: Verdict
    passes: bool
    reason: str
    needed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """How a variant stands against the whole budget: the worst of its judgements.

    Attributes:
        judgements: One per criterion that the budget has.
    """

    judgements: tuple[Judgement, ...]

    @property
    def verdict(self) -> Verdict:
        """Missed if any criterion is, else undecided if any is, else met."""
        verdicts = {judgement.verdict for judgement in self.judgements}
        return "missed" if "missed" in verdicts else "undecided" if "undecided" in verdicts else "met"

    @property
    def passes(self) -> bool:
        """Whether every estimate meets its limit."""
        return all(judgement.passes for judgement in self.judgements)

    @property
    def latency_met(self) -> bool:
        """Whether every criterion but retention is met."""
        return all(j.verdict == "met" for j in self.judgements if j.criterion != "retention")

    @property
    def reasons(self) -> tuple[str, ...]:
        """The judgements' sentences."""
        return tuple(judgement.reason for judgement in self.judgements)


def judge(budget: Budget, measurement: Measurement, baseline: Measurement) -> Assessment:
    """Judges a variant against the budget and the baseline.

    Args:
        budget: The limits.
        measurement: The variant's.
        baseline: The baseline's, from the same interleaved run.

    Returns:
        A judgement per criterion.

    Raises:
        MeasurementError: The two come from different runs or different rows.
    """
    check_same_run(measurement, baseline)
    judgements: list[Judgement] = []
    if budget.p99_ms is not None:
        judgements.append(_judge_p99(budget, budget.p99_ms, measurement))
    if budget.speedup is not None:
        judgements.append(_judge_speedup(budget, budget.speedup, measurement, baseline))
    judgements.append(_judge_retention(budget, measurement, baseline))
    return Assessment(judgements=tuple(judgements))


def _judge_p99(budget: Budget, limit: float, measurement: Measurement) -> Judgement:
    samples = np.asarray(measurement.latency.samples_ms)
    n = len(samples)
    interval = measurement.latency.percentile_bounds(99)
    passes = interval.value <= limit
    if n < P99_MIN_SAMPLES:
        verdict: Verdict = "undecided"
    else:
        verdict = _at_most(interval, limit, budget.gate)
    reason = (
        f"p99 {interval.value:.3g} ms (95 % bound {_shown(interval.upper)}) against at most {limit:g} ms: {verdict}"
    )
    needed = None
    if verdict == "undecided" and passes:
        needed = P99_MIN_SAMPLES if budget.gate == "point" else _p99_samples(samples, limit)
    return Judgement(
        criterion="p99_ms", verdict=verdict, passes=passes, reason=_with(reason, needed, "samples"), needed=needed
    )


def _judge_speedup(budget: Budget, limit: float, measurement: Measurement, baseline: Measurement) -> Judgement:
    if measurement.variant == baseline.variant:
        interval = Interval(value=1.0, lower=1.0, upper=1.0)
    else:
        interval = speedup(baseline, measurement, level=ONE_SIDED)
    return _floor_judgement(
        "speedup", interval, limit, budget.gate,
        f"speed-up {interval.value:.3g}× (95 % bound {_shown(interval.lower)}) "
        f"against at least {limit:g}×", len(measurement.latency.samples_ms), "samples",
    )  # fmt: skip


def _judge_retention(budget: Budget, measurement: Measurement, baseline: Measurement) -> Judgement:
    if measurement.variant == baseline.variant:
        interval = Interval(value=1.0, lower=1.0, upper=1.0)
    else:
        interval = measurement.quality.retention(baseline.quality, level=ONE_SIDED)
    return _floor_judgement(
        "retention", interval, budget.retain, budget.gate, f"retains {interval.value:.2%} (95 % bound "
        f"{_shown(interval.lower, '.2%')}) of the accuracy against at least {budget.retain:.2%}",
        measurement.quality.n, "rows",
    )  # fmt: skip


def _floor_judgement(
    criterion: str, interval: Interval, limit: float, gate: Gate, sentence: str, n: int, unit: str
) -> Judgement:
    verdict = _at_least(interval, limit, gate)
    passes = interval.value >= limit
    needed = _rows_to_decide(interval, limit, n) if verdict == "undecided" else None
    reason = _with(f"{sentence}: {verdict}", needed, unit)
    return Judgement(criterion=criterion, verdict=verdict, passes=passes, reason=reason, needed=needed)


def _at_most(interval: Interval, limit: float, gate: Gate) -> Verdict:
    if gate == "point":
        return "met" if interval.value <= limit else "missed"
    if interval.upper is not None and interval.upper <= limit:
        return "met"
    return "missed" if interval.lower is not None and interval.lower > limit else "undecided"


def _at_least(interval: Interval, limit: float, gate: Gate) -> Verdict:
    if gate == "point":
        return "met" if interval.value >= limit else "missed"
    if interval.lower is not None and interval.lower >= limit:
        return "met"
    return "missed" if interval.upper is not None and interval.upper < limit else "undecided"


def _rows_to_decide(interval: Interval, limit: float, n: int) -> int | None:
    """Rows at which the half-width, shrinking as 1/sqrt(rows), would be the estimate's distance from the limit."""
    nearest = interval.lower if interval.value >= limit else interval.upper
    distance = abs(interval.value - limit)
    if nearest is None or distance == 0:
        return None
    return max(n + 1, math.ceil(n * (abs(interval.value - nearest) / distance) ** 2))


def _p99_samples(samples: NDArray[np.float64], limit: float) -> int | None:
    """Samples at which a share within the limit this far above 99 % would be told from 99 %, if they stay as alike."""
    share_within = float((samples <= limit).mean())
    if share_within <= 0.99:
        return None
    independent = max(P99_MIN_SAMPLES, ONE_SIDED_QUANTILE**2 * 0.99 * 0.01 / (share_within - 0.99) ** 2)
    enough = math.ceil(independent * percentile_effect(samples, 99))
    return enough if len(samples) < P99_MIN_SAMPLES else max(enough, len(samples) + 1)


def _with(reason: str, needed: int | None, unit: str) -> str:
    return reason if needed is None else f"{reason}; about {needed:,} {unit} would decide"


def _shown(value: float | None, form: str = ".3g") -> str:
    return "none" if value is None else format(value, form)
