"""A report's charts, as plain dictionaries in plotly's vocabulary.

Colours that depend on light or dark are left to the page's style sheet. Labels are escaped, since plotly reads them
as HTML.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any, NamedTuple

from hasten import report_words as words
from hasten.intervals import Interval
from hasten.measurement import GROUPS
from hasten.report import Report, VariantRow
from hasten.report_words import COLUMNS

Figure = dict[str, Any]


class Box(NamedTuple):
    """A rectangle in the picture's pixels, from its lower left corner."""

    left: float
    bottom: float
    right: float
    top: float


class Frame(NamedTuple):
    """What the picture spans, and the budget in it: milliseconds across, share of right answers up."""

    low: float
    high: float
    bottom: float
    top: float
    limit_ms: float
    floor: float

    def x(self, latency_ms: float) -> float:
        """Pixels from the left."""
        return PICTURE_WIDTH * math.log(latency_ms / self.low) / math.log(self.high / self.low)

    def y(self, share: float) -> float:
        """Pixels from the bottom."""
        return PICTURE_HEIGHT * (share - self.bottom) / (self.top - self.bottom)


class Mark(NamedTuple):
    """A variant's mark in the picture, with the boxes that it and its interval take."""

    name: str
    x: float
    y: float
    boxes: list[Box]


VERDICT_COLORS = {"met": "#1f9d57", "missed": "#d0504a", "undecided": "#c98a12"}
VERDICT_SYMBOLS = {"met": "circle", "missed": "x", "undecided": "diamond"}
LINE_COLORS = ("#8a8f98", "#3d85d9", "#d9702b", "#1a9e8f", "#c2549d", "#8a6fd6", "#a08a1c", "#d64f4f")
GROUP_COLORS: dict[str, str] = dict(
    zip(GROUPS, ("#64748b", "#2f8f83", "#2f74c7", "#c65f22", "#7759c2", "#b0468d", "#7a7466"), strict=True)
)
FEASIBLE = "rgba(31, 157, 87, 0.13)"
LIMIT_LINE = {"color": "#1f9d57", "width": 1.5, "dash": "dash"}
PICTURE_WIDTH, PICTURE_HEIGHT = 1000.0, 380.0
LABEL_PLACES = ("top right", "bottom right", "top left", "bottom left", "top center", "bottom center")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def figures(report: Report) -> dict[str, Figure]:
    """The charts by name; one without data is left out.

    Args:
        report: What to draw.

    Returns:
        `picture` (accuracy over latency), `lengths` (latency over length) and `time` (where the time goes).
    """
    drawn = {"picture": _picture(report), "lengths": _lengths(report), "time": _time(report)}
    return {name: figure for name, figure in drawn.items() if figure["data"]}


def _statistic(report: Report) -> str:
    """Which percentile the budget speaks of."""
    return "p99" if report.budget.p99_ms is not None else "p50"


def _layout(**changes: Any) -> Figure:
    base: Figure = {
        "font": {"family": FONT, "size": 13, "color": "#6b7280"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 64, "r": 28, "t": 40, "b": 56},
        "height": 440,
        "hoverlabel": {"bgcolor": "#1c2330", "bordercolor": "#1c2330", "font": {"color": "#ffffff", "family": FONT}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        "dragmode": False,
    }
    return base | changes


def _axis(title: str, **changes: Any) -> Figure:
    base: Figure = {
        "title": {"text": title, "standoff": 12, "font": {"size": 13}},
        "gridcolor": "#8884",
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
    }
    return base | changes


def _log_axis(title: str, low: float, high: float) -> Figure:
    """A logarithmic axis over a range, with ticks at 1, 2 and 5 times the powers of ten."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [round(step * 10.0**decade, 6) for decade in decades for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return _axis(
        title, type="log", range=[math.log10(low), math.log10(high)], tickvals=ticks, ticktext=[f"{t:g}" for t in ticks]
    )


def _picture(report: Report) -> Figure:
    """Accuracy over latency, with the region that the budget allows."""
    frame = _frame(report)
    places = label_places(frame, [_mark(frame, report, row) for row in report.variants])
    return {
        "data": [_point(report, row, places[row.name]) for row in report.variants],
        "layout": _layout(
            showlegend=False,
            height=480,
            xaxis=_log_axis(f"{_statistic(report)} latency of one text (ms, logarithmic)", frame.low, frame.high),
            yaxis=_axis("accuracy (share of rows right)", range=[frame.bottom, frame.top], tickformat=".1%"),
            shapes=_budget_shapes(frame),
            annotations=_budget_notes(report, frame),
        ),
    }


def _frame(report: Report) -> Frame:
    limit, floor = _latency_limit(report), report.budget.retain * report.baseline_row.accuracy.value
    latencies = [_latency(report, row) for row in report.variants]
    across = [limit, *(end for i in latencies for end in (i.value, i.lower, i.upper) if end)]
    shares = [row.accuracy for row in report.variants]
    up = [floor, *(end for share in shares for end in (share.lower, share.upper) if end is not None)]
    margin = 0.12 * (max(up) - min(up)) or 0.01
    return Frame(min(across) / 2, max(across) * 1.25, min(up) - margin, max(up) + margin, limit, floor)


def _latency(report: Report, row: VariantRow) -> Interval:
    return row.latency_ms.interval(_statistic(report))


def _latency_limit(report: Report) -> float:
    budget = report.budget
    if budget.p99_ms is not None:
        return budget.p99_ms
    return report.baseline_row.latency_ms.p50 / (budget.speedup or 1.0)


def _budget_shapes(frame: Frame) -> list[Figure]:
    limit, floor = frame.limit_ms, frame.floor
    region = {"type": "rect", "x0": frame.low, "x1": limit, "y0": floor, "y1": frame.top}
    return [
        region | {"fillcolor": FEASIBLE, "line": {"width": 0}, "layer": "below"},
        {"type": "line", "x0": limit, "x1": limit, "yref": "paper", "y0": 0, "y1": 1, "line": LIMIT_LINE},
        {"type": "line", "y0": floor, "y1": floor, "xref": "paper", "x0": 0, "x1": 1, "line": LIMIT_LINE},
    ]


def _budget_notes(report: Report, frame: Frame) -> list[Figure]:
    budget = report.budget
    limit = f"{frame.limit_ms:g}" if budget.p99_ms is not None else words.ms(frame.limit_ms)
    ratio = "" if budget.p99_ms is not None else f" ({budget.speedup:g}×)"
    plain: Figure = {"showarrow": False, "font": {"size": 12}}
    return [
        plain | {
            "text": f"{_statistic(report)} ≤ {limit} ms{ratio}", "x": math.log10(frame.limit_ms),
            "yref": "paper", "y": 1, "xanchor": "center", "yanchor": "bottom",
        },
        plain | {
            "text": f"{100 * budget.retain:.4g}% of the baseline’s accuracy", "xref": "paper", "x": 0, "y": frame.floor,
            "xanchor": "left", "yanchor": "top", "xshift": 4,
        },
    ]  # fmt: skip


def _mark(frame: Frame, report: Report, row: VariantRow) -> Mark:
    x, y = frame.x(_latency(report, row).value), frame.y(row.accuracy.value)
    lower, upper = (y if share is None else frame.y(share) for share in (row.accuracy.lower, row.accuracy.upper))
    return Mark(row.name, x, y, [Box(x - 9, y - 9, x + 9, y + 9), Box(x - 3, lower, x + 3, upper)])


def label_places(frame: Frame, marks: list[Mark]) -> dict[str, str]:
    """Where each label stands beside its mark: one after the other, wherever it hides the least."""
    limit, floor = frame.x(frame.limit_ms), frame.y(frame.floor)
    lines = [Box(limit - 2, 0, limit + 2, PICTURE_HEIGHT), Box(0, floor - 2, PICTURE_WIDTH, floor + 2)]
    taken = [*lines, *(box for mark in marks for box in mark.boxes)]
    places: dict[str, str] = {}
    for mark in marks:
        boxes = {place: _label_box(mark, place) for place in LABEL_PLACES}
        places[mark.name] = min(boxes, key=lambda place: _hidden(boxes[place], taken))
        taken.append(boxes[places[mark.name]])
    return places


def _label_box(mark: Mark, place: str) -> Box:
    """The pixels that a label is going to take, at about 7.5 by letter."""
    wide, (vertical, side) = 7.5 * len(mark.name), place.split()
    left = {"right": mark.x + 8, "left": mark.x - 8 - wide, "center": mark.x - wide / 2}[side]
    bottom = mark.y + 6 if vertical == "top" else mark.y - 22
    return Box(left, bottom, left + wide, bottom + 16)


def _hidden(box: Box, taken: list[Box]) -> float:
    """The area that a box shares with others or has outside the picture."""
    outside = max(0.0, box.right - PICTURE_WIDTH) + max(0.0, -box.left)
    overlaps = (
        max(0.0, min(box.right, other.right) - max(box.left, other.left))
        * max(0.0, min(box.top, other.top) - max(box.bottom, other.bottom))
        for other in taken
    )
    return sum(overlaps) + 16 * outside


def _point(report: Report, row: VariantRow, place: str) -> Figure:
    latency_ms = _latency(report, row)
    color, chosen = VERDICT_COLORS[row.verdict], row.name == report.chosen
    accuracy = Interval(value=row.accuracy.value, lower=row.accuracy.lower, upper=row.accuracy.upper)
    label = escape(row.name)
    return {
        "type": "scatter", "mode": "markers+text", "name": label, "x": [latency_ms.value], "y": [accuracy.value],
        "text": [f"<b>{label}</b>" if chosen else label],
        "textposition": place,
        "textfont": {"size": 13}, "cliponaxis": False,
        "marker": {
            "size": 15 if chosen else 11, "color": color, "symbol": VERDICT_SYMBOLS[row.verdict],
            "line": {"width": 3 if chosen else 0, "color": "#1f2937" if chosen else color},
        },
        "error_x": _error(latency_ms, color), "error_y": _error(accuracy, color),
        "hovertemplate": f"<b>{label}</b> ({row.verdict})<br>{_hover(row)}<extra></extra>",
    }  # fmt: skip


def _error(interval: Interval, color: str) -> Figure:
    above, below = ([abs(end - interval.value) if end is not None else 0] for end in (interval.upper, interval.lower))
    look = {"color": color, "thickness": 1.3, "width": 4}
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, **look}


def _hover(row: VariantRow) -> str:
    cells = words.cells(row)
    keys = ("accuracy", "retention", "speedup", "p50", "p99")
    lines = ((column, cells[column.key]) for column in COLUMNS if column.key in keys)
    return "<br>".join(
        f"{column.heading}: {cell.text} {f'[{cell.interval}]' if cell.interval else ''}" for column, cell in lines
    )


def _lengths(report: Report) -> Figure:
    """Median latency over length, a line per variant."""
    rows = [row for row in report.variants if row.latency_by_length]
    medians = [length.p50_ms.value for row in rows for length in row.latency_by_length] or [1.0]
    return {
        "data": [_length_line(report, row, LINE_COLORS[i % len(LINE_COLORS)]) for i, row in enumerate(rows)],
        "layout": _layout(
            xaxis=_axis(
                "length of the text (tokens, middle of its group)", rangemode="tozero", spikecolor="#8a8f98",
                spikethickness=1, unifiedhovertitle={"text": "about %{x:.0f} tokens"},
            ),
            yaxis=_log_axis("median latency (ms, logarithmic)", min(medians) / 1.4, max(medians) * 1.4),
            hovermode="x unified",
        ),
    }  # fmt: skip


def _length_line(report: Report, row: VariantRow, color: str) -> Figure:
    lengths = row.latency_by_length
    chosen, dash = row.name == report.chosen, "dot" if row.name == report.baseline else "solid"
    return {
        "type": "scatter", "mode": "lines+markers", "name": escape(row.name),
        "x": [(length.low_tokens + length.high_tokens) / 2 for length in lengths],
        "y": [length.p50_ms.value for length in lengths],
        "line": {"color": color, "width": 4 if chosen else 2, "dash": dash},
        "marker": {"size": 9 if chosen else 7, "color": color},
        "customdata": [f"{length.low_tokens}–{length.high_tokens} tokens" for length in lengths],
        "hovertemplate": "%{y:.2f} ms (%{customdata})",
    }  # fmt: skip


def _time(report: Report) -> Figure:
    """Each group's share of the profiled time, a stacked bar per variant."""
    rows = [row for row in reversed(report.variants) if row.breakdown_ms]
    groups = dict.fromkeys(group for row in rows for group in row.breakdown_ms)
    return {
        "data": [_time_bar(rows, group) for group in sorted(groups, key=_group_place)],
        "layout": _layout(
            barmode="stack",
            height=140 + 44 * len(rows),
            bargap=0.28,
            xaxis=_axis("share of the time of one text", range=[0, 1], dtick=0.2, tickformat=".0%"),
            yaxis=_axis("", ticks="", ticklabelstandoff=8),
            legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        ),
    }


def _group_place(group: str) -> int:
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def _time_bar(rows: list[VariantRow], group: str) -> Figure:
    parts = [words.shares(row).get(group, 0.0) for row in rows]
    return {
        "type": "bar", "orientation": "h", "name": escape(group), "x": parts, "y": [escape(row.name) for row in rows],
        "marker": {"color": GROUP_COLORS.get(group, GROUP_COLORS["other"]), "line": {"width": 0}},
        "text": [f"{part:.0%}" if part >= 0.06 else "" for part in parts],
        "textposition": "inside", "insidetextanchor": "middle", "textangle": 0,
        "textfont": {"color": "#ffffff", "size": 12},
        "customdata": [row.breakdown_ms.get(group, 0.0) for row in rows],
        "hovertemplate": "%{y}: " + escape(group) + " %{x:.1%}, %{customdata:.3g} ms under the profiler<extra></extra>",
    }  # fmt: skip
