"""A report for the terminal and as Markdown."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hasten import report_words as words
from hasten.budget import Budget
from hasten.load import Load
from hasten.report import Report, ShapeRow, VariantRow
from hasten.report_words import COLUMNS, Cell, Column, Grid

NARROW = (
    Column(key="parameters", title="params"),
    Column(key="size", title="size", unit="MB"),
    Column(key="accuracy", title="accuracy", unit="%"),
    Column(key="retention", title="retained", unit="%"),
)
TERMINAL_COLUMNS = tuple(next((narrow for narrow in NARROW if narrow.key == c.key), c) for c in COLUMNS)
LEFT_ALIGNED = ("model", "class", "text", "label", "what", "fact", "value", "latency", "verdict")
DROPPED_FIRST = ("mean", "p95", "parameters", "size", "accuracy", "p50")
VERDICT_STYLES = {"met": "green", "missed": "red", "undecided": "yellow"}
GAP = 2


def as_terminal(report: Report, *, width: int = 100, color: bool = False) -> str:
    """The result and the table, for a terminal.

    Args:
        report: What to show.
        width: Columns of the terminal; where it is narrow, the lesser figures are left out.
        color: Whether to add colours.

    Returns:
        Lines that end in a line break.
    """
    console = _console(width, color=color)
    with console.capture() as capture:
        console.print(Text(words.shortened(words.headline(report)), style="bold"))
        console.print(words.promise(report.budget), style="dim")
        console.print(Padding(_table(report, width), (1, 0)))
        for indent, line in _below(report):
            console.print(Padding(Text(words.shortened(line, 10 * width)), (0, 0, 0, indent)))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def shapes_as_terminal(shapes: Sequence[ShapeRow], budget: Budget, *, width: int = 100, color: bool = False) -> str:
    """The student shapes as measured, with the budget's line between those that fit and those that do not.

    Args:
        shapes: The shapes, smallest first.
        budget: What must be met.
        width: Columns of the terminal.
        color: Whether to add colours.

    Returns:
        Lines that end in a line break.
    """
    console = _console(width, color=color)
    table = _bare_table(words.SHAPE_HEADER)
    for row, above in zip(shapes, (None, *shapes[:-1]), strict=True):
        if not row.fits and (above is None or above.fits):
            table.add_row(*words.budget_cells(budget), style="dim")
        table.add_row(*words.shape_cells(row), style="bold" if row.chosen else "")
    with console.capture() as capture:
        console.print(words.latency_promise(budget), style="dim")
        console.print(Padding(table, (1, 0)))
        console.print(words.shape_reason(shapes))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def trials_as_terminal(trials: Sequence[Load], *, width: int = 100, color: bool = False) -> str:
    """Loads that were offered to a server, one a row.

    Args:
        trials: What became of each.
        width: Columns of the terminal.
        color: Whether to add colours.

    Returns:
        Lines that end in a line break.
    """
    console = _console(width, color=color)
    table = _bare_table(words.TRIAL_HEADER)
    for trial in trials:
        table.add_row(*words.trial_cells(trial), style="bold" if trial.holds else "")
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _bare_table(header: Sequence[str]) -> Table:
    """A table with titles and no rows."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for title in header:
        table.add_column(Text(title), justify="left" if title in LEFT_ALIGNED else "right", no_wrap=True)
    return table


def _console(width: int, *, color: bool) -> Console:
    return Console(
        file=io.StringIO(), width=width, force_terminal=color, color_system="standard" if color else None,
        no_color=not color, highlight=False, markup=False, emoji=False, legacy_windows=False,
    )  # fmt: skip


def _table(report: Report, width: int) -> Table:
    texts = [
        {column.key: _terminal_text(report, row, column) for column in TERMINAL_COLUMNS} for row in report.variants
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    shown = _fitting(texts, width)
    for column in shown:
        first = column.key == "name"
        table.add_column(
            Text(_terminal_heading(column)), justify="left" if first or column.key == "verdict" else "right",
            no_wrap=not first, overflow="fold",
        )  # fmt: skip
    for row, text in zip(report.variants, texts, strict=True):
        style = "bold" if row.name == report.chosen else ""
        table.add_row(*(_styled(text[column.key], column, row) for column in shown), style=style)
    return table


def _terminal_heading(column: Column) -> str:
    return f"{column.title}\n{column.unit}" if column.unit else column.title


def _terminal_text(report: Report, row: VariantRow, column: Column) -> str:
    text = words.cells(row)[column.key].text.removesuffix(column.unit).rstrip()
    if column.key == "name":
        return f"{words.MARK if row.name == report.chosen else ' '} {words.shortened(text)}"
    if column.key == "accuracy" and row.accuracy.lower is not None and row.accuracy.upper is not None:
        return f"{text} ±{50 * (row.accuracy.upper - row.accuracy.lower):.1f}"
    return text


def _fitting(texts: list[dict[str, str]], width: int) -> list[Column]:
    """The columns that fit side by side, the least telling left out first."""
    shown = list(TERMINAL_COLUMNS)
    for key in DROPPED_FIRST:
        if sum(_needed_width(texts, column) for column in shown) - GAP <= width:
            break
        shown = [column for column in shown if column.key != key]
    return shown


def _needed_width(texts: list[dict[str, str]], column: Column) -> int:
    return max(len(column.title), *(len(text[column.key]) for text in texts)) + GAP


def _styled(text: str, column: Column, row: VariantRow) -> Text:
    return Text(text, style=VERDICT_STYLES[row.verdict] if column.key == "verdict" else "")


def _below(report: Report) -> Iterable[tuple[int, str]]:
    """The lines under the table, with their indents: the reasons, then what would decide."""
    for row in words.judged(report):
        yield 0, f"{row.name}: {row.verdict}"
        yield from ((2, reason) for reason in row.reasons)
    if report.verdict != "met" and (needed := words.deciding(report)):
        yield 0, "What would decide:"
        yield from ((2, line) for line in needed)
    if removed := words.removed_sentence(report):
        yield 0, removed
    yield 0, words.evidence(report)


def as_markdown(report: Report) -> str:
    """The whole report as Markdown, with every foreign text escaped.

    Args:
        report: What to show.

    Returns:
        A document that ends in a line break.
    """
    sections = (
        ("", f"# hasten: {_md(report.model)}\n\n{_result(report)}"),
        ("", _md_table(_main_grid(report))),
        ("Why", _reasons(report)),
        ("Answers beside the baseline's", _md_table(words.answers_grid(report))),
        ("Classes that changed", _md_table(words.class_grid(report))),
        ("Texts answered in another way", _md_table(words.flip_grid(report))),
        ("Where the time goes", _time(report)),
        ("Median latency by length (ms)", _md_table(words.length_grid(report))),
        ("Student shapes, measured before training", _md_table(words.shape_grid(report))),
        ("How each variant proved itself", _md_table(words.step_grid(report))),
        ("Machine, versions, conditions", _md_table(words.machine_grid(report))),
        ("Do it again", _fenced(report.command)),
        ("Texts removed", _removed(report)),
        ("Notes", _bullets(report.notes)),
    )
    return "\n\n".join(f"## {title}\n\n{body}" if title else body for title, body in sections if body) + "\n"


def _result(report: Report) -> str:
    sentences = (words.headline(report), words.promise(report.budget), words.evidence(report))
    return " ".join(_md(sentence) for sentence in sentences)


def _main_grid(report: Report) -> Grid:
    return Grid(
        header=tuple(column.heading for column in COLUMNS),
        rows=tuple(
            tuple(_md_cell(report, row, column.key, words.cells(row)[column.key]) for column in COLUMNS)
            for row in report.variants
        ),
    )


def _md_cell(report: Report, row: VariantRow, key: str, cell: Cell) -> str:
    if key == "name":
        roles = [r for r, name in (("baseline", report.baseline), ("chosen", report.chosen)) if name == row.name]
        return f"{cell.text} ({', '.join(roles)})" if roles else cell.text
    return f"{cell.text} ({cell.interval})" if cell.interval else cell.text


def _reasons(report: Report) -> str:
    blocks = [f"{_md(row.name)}: {row.verdict}\n\n{_bullets(row.reasons)}" for row in words.judged(report)]
    if report.verdict != "met" and (needed := words.deciding(report)):
        blocks.append(f"What would decide:\n\n{_bullets(needed)}")
    return "\n\n".join(blocks)


def _time(report: Report) -> str:
    grid = _md_table(words.time_grid(report))
    return f"Shares of a run under the profiler.\n\n{grid}" if grid else ""


def _removed(report: Report) -> str:
    if not (sentence := words.removed_sentence(report)):
        return ""
    return f"{sentence}\n\n{_bullets(words.shortened(text) for text in report.removed.examples)}"


def _md_table(grid: Grid) -> str:
    if not grid.rows:
        return ""
    rule = tuple(":---" if title in LEFT_ALIGNED else "---:" for title in grid.header)
    lines = (tuple(map(_md, grid.header)), rule, *(tuple(map(_md, row)) for row in grid.rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_md(line)}" for line in lines)


def _md(text: str) -> str:
    """A foreign text as Markdown that shows it as it is, in one line."""
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """A text in a fence longer than any run of backticks within it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"
