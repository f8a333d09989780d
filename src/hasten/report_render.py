"""A report in any of its forms, as text or as files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from hasten.files import write_atomically
from hasten.report import Report

Form = Literal["terminal", "json", "markdown", "html"]


def render(report: Report, form: Form = "terminal", *, width: int = 100, color: bool = False) -> str:
    """A report as text; the same report always gives the same text.

    Args:
        report: What to show.
        form: `terminal`, `json`, `markdown` or `html`.
        width: Columns of the terminal; other forms ignore it.
        color: Whether the terminal shows colours; other forms ignore it.

    Returns:
        The text, ending in a line break.

    Raises:
        MissingExtraError: HTML was asked for and plotly or jinja2 is not installed.
    """
    from hasten.report_html import as_html
    from hasten.report_views import as_markdown, as_terminal

    match form:
        case "terminal":
            return as_terminal(report, width=width, color=color)
        case "json":
            return msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"
        case "markdown":
            return as_markdown(report)
        case "html":
            return as_html(report)


def save_report(report: Report, out: Path) -> None:
    """Writes `report.json`, `report.md` and `report.html` into a folder, each whole or not at all.

    Args:
        report: What to write.
        out: The folder; made if missing.

    Raises:
        MissingExtraError: plotly or jinja2 is not installed; nothing is written then.
    """
    forms: dict[str, Form] = {"report.json": "json", "report.md": "markdown", "report.html": "html"}
    texts = {name: render(report, form) for name, form in forms.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
