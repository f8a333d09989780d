"""The picture of `roofline.py`, drawn as SVG without a browser, in the colours of the reports."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from hasten.report_charts import FONT, GROUP_COLORS, LINE_COLORS

WIDTH, LEFT, RIGHT, TOP = 1080, 70, 1050, 64
CHART_HEIGHT, BAR_HEIGHT, BAR_STEP = 330, 18, 24
LABELS, MARGIN = 250, 46
TEXT = "#4b5563"


def text(x: float, y: float, content: str, *, anchor: str = "start", size: int = 13, color: str = TEXT) -> str:
    """A line of text."""
    look = f'text-anchor="{anchor}" font-size="{size}" fill="{color}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, color: str, extra: str = "") -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" {extra}/>'


def names(rows: list[dict[str, Any]]) -> list[str]:
    """The variants, in the order given."""
    return list(dict.fromkeys(row["variant"] for row in rows))


def rates(peaks: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Operations a second over length, a line a variant, with the machine's peaks; both axes logarithmic."""
    lengths = sorted({row["tokens"] for row in rows})
    ceilings = {"peak fp32": peaks["fp32_gops"], "peak INT8": peaks["int8_gops"]}
    low, high = min(row["gops"] for row in rows) / 1.4, max(ceilings.values()) * 1.25

    def x(tokens: float) -> float:
        return LEFT + (RIGHT - LEFT - 180) * math.log(tokens / lengths[0]) / math.log(lengths[-1] / lengths[0])

    def y(gops: float) -> float:
        return TOP + CHART_HEIGHT * math.log(high / gops) / math.log(high / low)

    drawn = [
        text(
            LEFT,
            28,
            "Billions of operations a second by length; after each name, the share of the peak at the longest",
            size=16,
        )
    ]
    ticks = [step * 10**power for power in range(5) for step in (1, 2, 5) if low <= step * 10**power <= high]
    for tick in ticks:
        drawn += [line(LEFT, y(tick), RIGHT, y(tick), "#8884"), text(LEFT - 8, y(tick) + 4, f"{tick:g}", anchor="end")]
    for tokens in lengths:
        drawn.append(text(x(tokens), TOP + CHART_HEIGHT + 20, f"{tokens} tokens", anchor="middle"))
    for name, gops in ceilings.items():
        drawn += [line(LEFT, y(gops), RIGHT, y(gops), "#1f9d57", 'stroke-width="1.5" stroke-dasharray="6 4"')]
        drawn.append(text(LEFT + 8, y(gops) - 6, f"{name}: {gops:.0f}", color="#1f9d57"))
    labels: list[float] = []
    for variant, color in zip(names(rows), LINE_COLORS[1:], strict=False):
        own = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["tokens"])
        points = [(x(row["tokens"]), y(row["gops"])) for row in own]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        drawn += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{color}"/>' for a, b in points]
        labels.append(free_place(points[-1][1] + 4, labels))
        drawn.append(text(points[-1][0] + 10, labels[-1], f"{variant}, {own[-1]['share_of_peak']:.0%}", color=color))
    return drawn


def free_place(wanted: float, taken: list[float]) -> float:
    """The place nearest to the one wanted that is a line away from those taken."""
    places = [wanted, *(place + step for place in taken for step in (-16.0, 16.0))]
    free = [place for place in places if all(abs(place - other) > 15 for other in taken)]
    return min(free, key=lambda place: abs(place - wanted))


def bars(rows: list[dict[str, Any]], top: float) -> list[str]:
    """Shares of the profiled time by group, a bar a variant and length."""
    groups = list(rows[0]["profiled_ms"])
    colors = dict(zip(groups, [*GROUP_COLORS.values(), "#b8bcc4", "#d9a441"], strict=False))
    drawn = [text(LEFT, top, "What the time is spent on (under onnxruntime's profiler)", size=16)]
    for number, group in enumerate(groups):
        left, below = LEFT + 250 * (number % 4), top + 24 + 20 * (number // 4)
        drawn.append(f'<rect x="{left}" y="{below - 11}" width="12" height="12" fill="{colors[group]}"/>')
        drawn.append(text(left + 18, below, group))
    at = top + 66
    for variant in names(rows):
        for row in (row for row in rows if row["variant"] == variant):
            label = f"{variant}, {row['tokens']} tokens, {row['p50_ms']:.1f} ms"
            drawn.append(text(LEFT + LABELS - 10, at + 13, label, anchor="end", size=12))
            drawn += bar(row["profiled_ms"], colors, at)
            at += BAR_STEP
        at += 8
    return drawn


def bar(spent: dict[str, float], colors: dict[str, str], at: float) -> list[str]:
    """One stacked bar, with the shares of 5 % and more written in it."""
    whole, left, drawn = sum(spent.values()), float(LEFT + LABELS), []
    for group, ms in spent.items():
        wide = (RIGHT - LEFT - LABELS) * ms / whole
        drawn.append(
            f'<rect x="{left:.1f}" y="{at:.1f}" width="{wide:.1f}" height="{BAR_HEIGHT}" fill="{colors[group]}"/>'
        )
        if ms / whole >= 0.05:
            drawn.append(text(left + wide / 2, at + 13, f"{ms / whole:.0%}", anchor="middle", size=11, color="#ffffff"))
        left += wide
    return drawn


def picture(peaks: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The whole picture.

    Args:
        peaks: The machine's peaks, as `roofline.measured_peaks` gives them.
        rows: A row for each variant and length, as `roofline.row_of` gives them.

    Returns:
        An SVG document.
    """
    top = TOP + CHART_HEIGHT + 70
    height = top + 66 + BAR_STEP * len(rows) + 8 * len(names(rows)) + MARGIN
    content = "\n".join([*rates(peaks, rows), *bars(rows, top)])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="{escape(FONT)}">'
    return f'{head}\n<rect width="100%" height="100%" fill="#ffffff"/>\n{content}\n</svg>'
