"""Measurements of one interleaved run → one comparison, as data; rendering it is `report_render`'s.

`compare` measures nothing and reads no clock: the same measurements give the same report, byte for byte, in whatever
order they are handed over. The dataclasses are the contract of `report.json`, field by field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from hasten.answers import Answers, compare_answers
from hasten.budget import Budget, Judgement, Verdict, judge
from hasten.errors import MeasurementError
from hasten.files import read_document
from hasten.intervals import Interval
from hasten.measurement import GROUPS, Host, Latency, LengthRow, Measurement, Quality, Scenario, speedup
from hasten.variant import Parameters

SCHEMA = "hasten.report/3"
REMOVED_EXAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRow:
    """A student shape, measured with random weights before any training.

    Attributes:
        name: Layers x hidden size, such as `2x128`.
        layers: Number of transformer layers.
        hidden: Hidden size.
        parameters: Number of weights.
        p50_ms: Median latency with its interval.
        p99_ms: 99th percentile of latency with its interval.
        speedup: Median latency of the baseline over that of the shape, with its interval.
        fits: Whether it keeps to the latency part of the budget with headroom, see `hasten.student_search`.
        chosen: Whether it is the one that was trained.
    """

    name: str
    layers: int
    hidden: int
    parameters: int
    p50_ms: Interval
    p99_ms: Interval
    speedup: Interval
    fits: bool
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a report says beside its measurements.

    Attributes:
        budget: The promise to judge by.
        baseline: Name of the variant that the others are compared with.
        chosen: Name of the variant to serve; None where none qualifies.
        command: The exact command that does it all again.
        model: The model that was brought in.
        rows: Number of rows by split.
        removed: Texts taken out of the training or validation rows since they stand in the validation or test rows too.
        notes: Anything else a reader should know, a sentence each.
        shapes: The student shapes that were measured.
        steps: What each variant's step found out while it proved its result, by the variant's name.
        labels: Names of the labels by id; the ids themselves if empty.
        texts: The measured rows' texts, to show some whose answer flipped; none if empty.
    """

    budget: Budget
    baseline: str
    chosen: str | None
    command: str
    model: str
    rows: dict[str, int] = field(default_factory=dict[str, int])
    removed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    shapes: tuple[ShapeRow, ...] = ()
    steps: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    labels: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Share of right answers with its two-sided 95 % interval.

    Attributes:
        value: Share, 0 to 1.
        lower: Lower limit.
        upper: Upper limit.
        n: Number of rows.
    """

    value: float
    lower: float | None
    upper: float | None
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySummary:
    """Mean and percentiles of latency in milliseconds, each with the limits of its two-sided 95 % interval.

    A limit is None where there are too few samples to give one.

    Attributes:
        mean: Mean.
        mean_lower: Its lower limit.
        mean_upper: Its upper limit.
        p50: Median.
        p50_lower: Its lower limit.
        p50_upper: Its upper limit.
        p95: 95th percentile.
        p95_lower: Its lower limit.
        p95_upper: Its upper limit.
        p99: 99th percentile.
        p99_lower: Its lower limit.
        p99_upper: Its upper limit.
        n: Number of samples.
    """

    mean: float
    mean_lower: float | None
    mean_upper: float | None
    p50: float
    p50_lower: float | None
    p50_upper: float | None
    p95: float
    p95_lower: float | None
    p95_upper: float | None
    p99: float
    p99_lower: float | None
    p99_upper: float | None
    n: int

    def interval(self, statistic: str) -> Interval:
        """`mean`, `p50`, `p95` or `p99` with its limits, in milliseconds."""
        value, lower, upper = (getattr(self, f"{statistic}{end}") for end in ("", "_lower", "_upper"))
        return Interval(value=value, lower=lower, upper=upper)


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRow:
    """One variant beside the baseline.

    Attributes:
        name: The variant's name.
        digest: The variant's digest.
        format: `torch`, `onnx` or `openvino`.
        precision: As in the variant's manifest.
        parameters: Number of weights.
        parameters_by_part: The same by part of the model.
        size_bytes: Size of the weights file.
        peak_memory_bytes: Peak resident memory of the process that ran it.
        accuracy: Share of right answers.
        retention: Share of the baseline's accuracy that is kept.
        answers: Its answers beside the baseline's.
        latency_ms: Latency over all samples.
        latency_by_length: Latency from the shortest texts to the longest.
        breakdown_ms: Mean milliseconds a text by group of operators, in the order of `measurement.GROUPS`.
        speedup: How many times lower the median latency is than the baseline's.
        speedup_interval: The same with its two-sided 95 % interval.
        verdict: Met, missed or undecided, against the whole budget.
        reasons: A sentence per criterion.
        needed: Rows or samples that would decide what is undecided, by criterion.
        judgements: The verdict, its reason and what it needs, per criterion.
    """

    name: str
    digest: str
    format: str
    precision: str
    parameters: int
    parameters_by_part: Parameters
    size_bytes: int
    peak_memory_bytes: int
    accuracy: Accuracy
    retention: Interval
    answers: Answers
    latency_ms: LatencySummary
    latency_by_length: tuple[LengthRow, ...]
    breakdown_ms: dict[str, float]
    speedup: float
    speedup_interval: Interval
    verdict: Verdict
    reasons: tuple[str, ...]
    needed: dict[str, int]
    judgements: tuple[Judgement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """Texts taken out of the training rows.

    Attributes:
        count: How many.
        examples: The first few.
    """

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The comparison: the content of `report.json`.

    Attributes:
        schema: `hasten.report/3`.
        budget: The promise.
        baseline: Name of the variant the others are compared with.
        chosen: Name of the variant to serve; None where none qualifies.
        verdict: The chosen variant's; `missed` where none is chosen.
        host: The machine and the software.
        scenario: The conditions.
        variants: The baseline first, then from the slowest median to the fastest.
        model: The model that was brought in.
        command: The exact command that does it all again.
        rows: Number of rows by split.
        removed: Texts taken out of the training or validation rows.
        notes: Anything else a reader should know.
        shapes: The student shapes that were measured.
        steps: What each variant's step found out, by the variant's name.
    """

    schema: str
    budget: Budget
    baseline: str
    chosen: str | None
    verdict: Verdict
    host: Host
    scenario: Scenario
    variants: tuple[VariantRow, ...]
    model: str
    command: str
    rows: dict[str, int]
    removed: Removed
    notes: tuple[str, ...]
    shapes: tuple[ShapeRow, ...]
    steps: dict[str, dict[str, Any]]

    @property
    def baseline_row(self) -> VariantRow:
        """The baseline's row."""
        return next(row for row in self.variants if row.name == self.baseline)

    @property
    def chosen_row(self) -> VariantRow | None:
        """The chosen variant's row; None where none is chosen."""
        return next((row for row in self.variants if row.name == self.chosen), None)


def compare(measurements: Sequence[Measurement], run: RunInfo) -> Report:
    """Sets variants side by side and judges each against the budget.

    Args:
        measurements: One per variant, all from one interleaved run; in any order.
        run: What the report says beside them.

    Returns:
        The comparison; a pure function of its arguments.

    Raises:
        MeasurementError: The measurements come from different runs, a variant stands twice, or the baseline or the
            chosen variant is not among them.
    """
    by_name = _by_name(measurements, run)
    baseline = by_name[run.baseline]
    rows = _rows(by_name, run)
    chosen = next((row for row in rows if row.name == run.chosen), None)
    report = Report(
        schema=SCHEMA,
        budget=run.budget,
        baseline=run.baseline,
        chosen=run.chosen,
        verdict=chosen.verdict if chosen else "missed",
        host=baseline.host,
        scenario=baseline.scenario,
        variants=rows,
        model=run.model,
        command=run.command,
        rows=run.rows,
        removed=Removed(count=len(run.removed), examples=run.removed[:REMOVED_EXAMPLES]),
        notes=run.notes,
        shapes=run.shapes,
        steps=run.steps,
    )
    # As a file gives it back, where a whole 2 has become 2.0: a report re-created later is the same to the byte.
    return msgspec.json.decode(msgspec.json.encode(report), type=Report)


def _by_name(measurements: Sequence[Measurement], run: RunInfo) -> dict[str, Measurement]:
    by_name = {measurement.variant: measurement for measurement in measurements}
    if len(by_name) != len(measurements):
        raise MeasurementError("a variant stands twice among the measurements; hand over one run's, one per variant")
    for role, name in (("baseline", run.baseline), ("chosen variant", run.chosen)):
        if name is not None and name not in by_name:
            known = ", ".join(sorted(by_name)) or "nothing"
            raise MeasurementError(f"no measurement of the {role} {name!r}, only of {known}; measure it too")
    key = by_name[run.baseline].scenario.key
    if strangers := sorted(name for name, m in by_name.items() if m.scenario.key != key):
        names = ", ".join(strangers)
        raise MeasurementError(
            f"{names} and {run.baseline} were measured in different runs; only one interleaved run compares"
        )
    return by_name


def _rows(by_name: dict[str, Measurement], run: RunInfo) -> tuple[VariantRow, ...]:
    rows = [_row(run, measurement, by_name[run.baseline]) for measurement in by_name.values()]
    return tuple(sorted(rows, key=lambda row: (row.name != run.baseline, -row.latency_ms.p50, row.name)))


def _row(run: RunInfo, measurement: Measurement, baseline: Measurement) -> VariantRow:
    assessment = judge(run.budget, measurement, baseline)
    faster = _beside_itself() if measurement is baseline else speedup(baseline, measurement)
    kept = _beside_itself() if measurement is baseline else measurement.quality.retention(baseline.quality)
    return VariantRow(
        name=measurement.variant,
        digest=measurement.digest,
        format=measurement.format,
        precision=measurement.precision,
        parameters=measurement.parameters.total,
        parameters_by_part=measurement.parameters,
        size_bytes=measurement.size_bytes,
        peak_memory_bytes=measurement.peak_memory_bytes,
        accuracy=_accuracy(measurement.quality),
        retention=kept,
        answers=compare_answers(measurement.quality, baseline.quality, labels=run.labels, texts=run.texts),
        latency_ms=_summary(measurement.latency),
        latency_by_length=tuple(measurement.latency.by_length()),
        breakdown_ms=_in_order(measurement.breakdown_ms),
        speedup=faster.value,
        speedup_interval=faster,
        verdict=assessment.verdict,
        reasons=assessment.reasons,
        needed={j.criterion: j.needed for j in assessment.judgements if j.needed is not None},
        judgements=assessment.judgements,
    )


def _beside_itself() -> Interval:
    return Interval(value=1.0, lower=1.0, upper=1.0)


def _accuracy(quality: Quality) -> Accuracy:
    share = quality.accuracy()
    return Accuracy(value=share.value, lower=share.lower, upper=share.upper, n=quality.n)


def _summary(latency: Latency) -> LatencySummary:
    mean, p50, p95, p99 = latency.mean(), *(latency.percentile(q) for q in (50, 95, 99))
    return LatencySummary(
        mean=mean.value, mean_lower=mean.lower, mean_upper=mean.upper,
        p50=p50.value, p50_lower=p50.lower, p50_upper=p50.upper,
        p95=p95.value, p95_lower=p95.lower, p95_upper=p95.upper,
        p99=p99.value, p99_lower=p99.lower, p99_upper=p99.upper,
        n=len(latency.samples_ms),
    )  # fmt: skip


def _in_order(breakdown_ms: dict[str, float]) -> dict[str, float]:
    known = [group for group in GROUPS if group in breakdown_ms]
    return {group: breakdown_ms[group] for group in [*known, *sorted(set(breakdown_ms) - set(GROUPS))]}


def load_report(path: Path) -> Report:
    """Reads a `report.json`, to render it again without the measurements.

    Args:
        path: The file.

    Returns:
        The report that was saved.

    Raises:
        MeasurementError: The file is not a report of this schema.
    """
    return read_document(path, Report, SCHEMA, MeasurementError)
