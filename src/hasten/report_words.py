"""How a report's figures read: the result sentence, the table cells and the grids that every rendering shows alike.

Nothing here escapes anything: each rendering escapes for its own language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from hasten.answers import ClassRow
from hasten.budget import Budget, Judgement
from hasten.intervals import Interval
from hasten.load import Load
from hasten.measurement import GROUPS
from hasten.report import Report, ShapeRow, VariantRow

LIMIT_UNITS = {"p99_ms": "samples per variant", "speedup": "samples per variant", "retention": "labelled test rows"}
NONE = "–"
MARK = "▶"
SHAPE_HEADER = ("layers x hidden", "parameters", "p50 (ms)", "p99 (ms)", "speed-up", "latency")
TRIAL_HEADER = ("rate (1/s)", "requests", "late", "refused", "errors", "goodput (1/s)", "p50 (ms)", "p99 (ms)", "p99")
LONGEST_VALUE = 200
EXTREMES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the main table.

    Attributes:
        key: Its cells' key in `cells`.
        title: What it holds.
        unit: The cells' unit; empty where they carry it themselves.
    """

    key: str
    title: str
    unit: str = ""

    @property
    def heading(self) -> str:
        """Title and unit in one line."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


COLUMNS = (
    Column(key="name", title="model"),
    Column(key="parameters", title="parameters"),
    Column(key="size", title="size"),
    Column(key="accuracy", title="accuracy"),
    Column(key="retention", title="retained"),
    Column(key="mean", title="mean", unit="ms"),
    Column(key="p50", title="p50", unit="ms"),
    Column(key="p95", title="p95", unit="ms"),
    Column(key="p99", title="p99", unit="ms"),
    Column(key="speedup", title="speed-up"),
    Column(key="verdict", title="verdict"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One figure as it reads.

    Attributes:
        text: The estimate, with its unit unless the column has it.
        interval: Its two-sided 95 % interval; empty where it has none.
    """

    text: str
    interval: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A small table of texts.

    Attributes:
        header: Column titles.
        rows: Cells, as many as there are titles.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def cells(row: VariantRow) -> dict[str, Cell]:
    """A variant's figures by column key."""
    share = Interval(value=row.accuracy.value, lower=row.accuracy.lower, upper=row.accuracy.upper)
    latencies = {key: ms_cell(row.latency_ms.interval(key)) for key in ("mean", "p50", "p95", "p99")}
    return {
        "name": Cell(text=row.name),
        "parameters": Cell(text=count(row.parameters)),
        "size": Cell(text=megabytes(row.size_bytes)),
        "accuracy": percent_cell(share, decimals=1),
        "retention": percent_cell(row.retention, decimals=2),
        **latencies,
        "speedup": times_cell(row.speedup_interval),
        "verdict": Cell(text=row.verdict),
    }


def ms_cell(interval: Interval) -> Cell:
    """Milliseconds and their interval, without the unit."""
    return Cell(text=ms(interval.value), interval=between(interval, ms))


def percent_cell(interval: Interval, *, decimals: int) -> Cell:
    """A share as a percentage and its interval."""
    return Cell(
        text=f"{interval.value:.{decimals}%}", interval=between(interval, lambda share: f"{100 * share:.{decimals}f}")
    )


def times_cell(interval: Interval) -> Cell:
    """A ratio and its interval."""
    return Cell(text=times(interval.value), interval=between(interval, lambda ratio: times(ratio)[:-1]))


def between(interval: Interval, form: Callable[[float], str]) -> str:
    """`lower–upper` in a given form; empty where the interval is a point, a dash where a limit is missing."""
    if interval.lower == interval.upper == interval.value:
        return ""
    return "–".join("?" if limit is None else form(limit) for limit in (interval.lower, interval.upper))


def ms(value_ms: float) -> str:
    """Milliseconds at three significant digits, whole above 100 and of three decimals at most, without the unit."""
    decimals = sum(value_ms < limit for limit in (99.95, 9.995, 0.9995))
    return f"{value_ms:,.{decimals}f}"


def times(ratio: float) -> str:
    """A ratio such as `3.42×`."""
    return f"{ratio:.1f}×" if ratio >= 9.995 else f"{ratio:.2f}×"


def count(number: int) -> str:
    """A number of weights such as `22.7 M`."""
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number / 1e3:,.0f} k" if number >= 1e4 else f"{number:,}"


def megabytes(size_bytes: int) -> str:
    """A size such as `90.9 MB` (10^6 bytes)."""
    return f"{size_bytes / 1e6:,.0f} MB" if size_bytes >= 99.95e6 else f"{size_bytes / 1e6:.1f} MB"


def headline(report: Report) -> str:
    """The result in one sentence."""
    row = report.chosen_row
    if row is None:
        return "No variant passed on the validation split; none is chosen."
    if row.verdict == "undecided":
        leaning = "looks as if it meets" if all(j.passes for j in row.judgements) else "comes near"
        return f"{row.name} {leaning} the budget, but these measurements cannot prove it: {figures(report, row)}."
    return f"{row.name} {'meets' if row.verdict == 'met' else 'misses'} the budget: {figures(report, row)}."


def figures(report: Report, row: VariantRow) -> str:
    """A variant's main figures in one phrase."""
    latency = f"p99 {ms(row.latency_ms.p99)} ms"
    if row.name == report.baseline:
        return f"{latency}, {row.accuracy.value:.1%} accuracy, as it was brought in"
    faster = f"{times(row.speedup)} the speed of {report.baseline}"
    return f"{faster}, {latency}, {row.retention.value:.2%} of its accuracy kept"


def promise(budget: Budget) -> str:
    """The budget in one sentence."""
    limits = _latency_limits(budget)
    limits.append(f"at least {100 * budget.retain:.4g}% of the baseline's accuracy kept")
    how = "one-sided 95 % bound" if budget.gate == "bound" else "estimate"
    return f"Budget: {', '.join(limits)}; the {how} must meet each limit."


def latency_promise(budget: Budget) -> str:
    """The latency part of the budget in one sentence."""
    return f"Budget: {', '.join(_latency_limits(budget))}."


def _latency_limits(budget: Budget) -> list[str]:
    limits = [f"p99 at most {budget.p99_ms:g} ms"] if budget.p99_ms is not None else []
    return limits + ([f"speed-up at least {budget.speedup:g}×"] if budget.speedup is not None else [])


def evidence(report: Report) -> str:
    """What the figures rest on, in one sentence."""
    row, scenario = report.baseline_row, report.scenario
    threads = "1 thread" if scenario.threads == 1 else f"{scenario.threads} threads"
    rows = f"{row.accuracy.n:,} rows of the {scenario.split} split for accuracy"
    samples = f"{row.latency_ms.n:,} single-text requests per variant for latency"
    return f"Measured on {rows} and {samples}, all variants interleaved in one run, {threads} each."


def judged(report: Report) -> tuple[VariantRow, ...]:
    """Whose reasons answer the reader's question: the chosen variant's, or everyone's where none is chosen."""
    row = report.chosen_row
    others = tuple(other for other in report.variants if other.name != report.baseline)
    return (row,) if row is not None else others or report.variants


def deciding(report: Report) -> tuple[str, ...]:
    """What would decide what is undecided, a sentence per criterion."""
    many = len(judged(report)) > 1
    return tuple(
        f"{row.name}, {_decider(judgement)}" if many else _decider(judgement)
        for row in judged(report)
        for judgement in row.judgements
        if judgement.verdict == "undecided"
    )


def _decider(judgement: Judgement) -> str:
    criterion = {"p99_ms": "p99", "speedup": "speed-up"}.get(judgement.criterion, judgement.criterion)
    if judgement.needed is None:
        return f"{criterion}: more {LIMIT_UNITS[judgement.criterion]}; from these it cannot be said how many"
    return f"{criterion}: about {judgement.needed:,} {LIMIT_UNITS[judgement.criterion]}, if the estimate stays"


def time_grid(report: Report) -> Grid:
    """Where the time goes: each group's share, by variant."""
    present = {group for row in report.variants for group in row.breakdown_ms}
    groups = [group for group in (*GROUPS, *sorted(present - set(GROUPS))) if group in present]
    rows = (
        (row.name, *(f"{shares(row)[group]:.0%}" if group in row.breakdown_ms else NONE for group in groups))
        for row in report.variants
        if row.breakdown_ms
    )
    return Grid(header=("model", *groups), rows=tuple(rows))


def shares(row: VariantRow) -> dict[str, float]:
    """Each group's share of a variant's profiled time, 0 to 1."""
    total = sum(row.breakdown_ms.values()) or 1.0
    return {group: value / total for group, value in row.breakdown_ms.items()}


def length_grid(report: Report) -> Grid:
    """Median latency by range of lengths, a column per variant."""
    names = tuple(row.name for row in report.variants)
    medians = {(span, row.name): median for row in report.variants for span, median in _medians_by_length(row)}
    spans = sorted({span for span, _ in medians})
    rows = ((f"{span[0]}–{span[1]}", *(medians.get((span, name), NONE) for name in names)) for span in spans)
    return Grid(header=("tokens", *names), rows=tuple(rows))


def _medians_by_length(row: VariantRow) -> Generator[tuple[tuple[int, int, int], str]]:
    seen = Counter[tuple[int, int]]()  # several ranges may be of truncated texts, and alike
    for length in row.latency_by_length:
        span = (length.low_tokens, length.high_tokens)
        yield (*span, seen[span]), ms(length.p50_ms.value)
        seen[span] += 1


def shape_grid(report: Report) -> Grid:
    """The student shapes that were measured before any training."""
    return Grid(header=SHAPE_HEADER, rows=tuple(shape_cells(shape) for shape in report.shapes))


def shape_cells(shape: ShapeRow) -> tuple[str, ...]:
    """A shape's figures, as many as `SHAPE_HEADER` has titles."""
    fit = ("fits" if shape.fits else "no headroom") + (", chosen" if shape.chosen else "")
    figures = (ms_cell(shape.p50_ms), ms_cell(shape.p99_ms), times_cell(shape.speedup))
    return (shape.name, count(shape.parameters), *map(_with_interval, figures), fit)


def budget_cells(budget: Budget) -> tuple[str, ...]:
    """The budget's limits among the shapes' figures."""
    p99 = "" if budget.p99_ms is None else f"≤ {budget.p99_ms:g}"
    return ("budget", "", "", p99, "" if budget.speedup is None else f"≥ {budget.speedup:g}×", "")


def shape_reason(shapes: Sequence[ShapeRow]) -> str:
    """Why a shape was chosen, in one sentence."""
    chosen = next(shape for shape in shapes if shape.chosen)
    if not chosen.fits:
        return f"No shape keeps the latency budget with headroom; {chosen.name} is the fastest that was measured."
    larger = any(not shape.fits for shape in shapes[shapes.index(chosen) + 1 :])
    more = "the next larger one does not" if larger else "no larger one was measured"
    return f"{chosen.name} is the largest that keeps the latency budget with headroom: {more}."


def answers_grid(report: Report) -> Grid:
    """Each variant's answers beside the baseline's."""
    rows = (
        (
            row.name,
            _with_interval(percent_cell(row.answers.agreement, decimals=1)),
            f"{row.answers.flips:,}",
            NONE if row.answers.calibration_error is None else f"{row.answers.calibration_error:.1%}",
            _class_cell(row.answers.classes[0]),
        )
        for row in report.variants
    )
    header = ("model", "answers as the baseline", "flipped", "calibration error", "recall of the class that loses most")
    return Grid(header=header, rows=tuple(rows))


def class_grid(report: Report) -> Grid:
    """The classes of one variant that lose the most, and those that gain."""
    header = ("class", "rows", f"recall of {report.baseline}", f"of {answering(report).name}")
    moved = [row for row in answering(report).answers.classes if row.recall.value != row.baseline_recall.value]
    shown = moved if len(moved) <= 2 * EXTREMES else [*moved[:EXTREMES], *moved[-EXTREMES:]]
    recalls = ((percent_cell(recall, decimals=1) for recall in (row.baseline_recall, row.recall)) for row in shown)
    rows = ((row.label, f"{row.n:,}", *map(_with_interval, both)) for row, both in zip(shown, recalls, strict=True))
    return Grid(header=header, rows=tuple(rows))


def flip_grid(report: Report) -> Grid:
    """Texts that one variant answers in another way than the baseline."""
    rows = ((shortened(f.text), f.expected, f.baseline, f.answer) for f in answering(report).answers.examples)
    header = ("text", "label", report.baseline, answering(report).name)
    return Grid(header=header, rows=tuple(rows))


def answering(report: Report) -> VariantRow:
    """Whose answers are shown one by one: the chosen variant's, or the fastest's where none is chosen."""
    return report.chosen_row or report.variants[-1]


def _class_cell(row: ClassRow) -> str:
    """A class that loses recall; a dash where none does."""
    change = 100 * (row.recall.value - row.baseline_recall.value)
    if change >= 0:
        return NONE
    return f"{shortened(row.label)}: {row.recall.value:.1%} ({change:+.1f} points)"


def _with_interval(cell: Cell) -> str:
    return f"{cell.text} ({cell.interval})" if cell.interval else cell.text


def trial_cells(trial: Load) -> tuple[str, ...]:
    """A load's figures, as many as `TRIAL_HEADER` has titles."""
    p50, p99 = (ms_cell(trial.percentile(q)) if trial.latencies_ms else Cell(text=NONE) for q in (50, 99))
    counts = (trial.offered, len(trial.latencies_ms) - trial.good, len(trial.refused_ms), sum(trial.errors.values()))
    shown = (f"{trial.rate:.1f}", *(f"{number:,}" for number in counts), f"{trial.goodput:.1f}")
    return (*shown, p50.text, _with_interval(p99), "holds" if trial.holds else "not shown")


def machine_grid(report: Report) -> Grid:
    """The machine, the software and the conditions."""
    host, scenario = report.host, report.scenario
    facts = {
        "processor": host.cpu,
        "cores": f"{host.cores:g}",
        "instructions": ", ".join(host.instructions) or NONE,
        "memory": f"{host.memory_bytes / 1e9:.1f} GB",
        "system": host.system,
        "python": host.python,
        **host.versions,
        "threads per variant": str(scenario.threads),
        "requests before counting": str(scenario.warmup),
        "rows": listed(f"{split} {number:,}" for split, number in report.rows.items()),
        "workload digest": scenario.workload_digest,
    }
    return Grid(header=("what", "value"), rows=tuple(facts.items()))


def step_grid(report: Report) -> Grid:
    """What each variant's step found out while it proved its result."""
    rows = ((name, fact, plain_value(value)) for name, facts in report.steps.items() for fact, value in facts.items())
    return Grid(header=("model", "fact", "value"), rows=tuple(rows))


def plain_value(value: Any) -> str:
    """A fact in one short line; `report.json` has it whole."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return shortened(listed(f"{key} {plain_value(item)}" for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return shortened(listed(plain_value(item) for item in value))
    return shortened(value if isinstance(value, str) else msgspec.json.encode(value).decode())


def listed(parts: Iterable[str]) -> str:
    """Parts with commas between; a dash for none."""
    return ", ".join(parts) or NONE


def shortened(text: str, longest: int = LONGEST_VALUE) -> str:
    """A text in one line and not too long, with every control character replaced."""
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def removed_sentence(report: Report) -> str:
    """How many texts were taken out of the training rows; empty for none."""
    if (number := report.removed.count) == 0:
        return ""
    texts = "1 text" if number == 1 else f"{number:,} texts"
    return f"{texts} removed from the training or validation rows, standing in the validation or test rows as well."
