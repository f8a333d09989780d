"""A report as one HTML page that loads nothing: plotly.js stands in it once, and its policy forbids the network."""

from __future__ import annotations

from hasten import report_words as words
from hasten.errors import MissingExtraError
from hasten.report import Report
from hasten.report_charts import figures
from hasten.report_words import COLUMNS


def as_html(report: Report) -> str:
    """The whole report as one self-contained HTML page.

    Args:
        report: What to show.

    Returns:
        The page; the same report always gives the same page.

    Raises:
        MissingExtraError: plotly or jinja2 is not installed.
    """
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError(error.name or "plotly", "optimize") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hasten", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    page = environment.get_template("report.html.jinja")
    return page.render(
        report=report, words=words, columns=COLUMNS, chosen=report.chosen_row, charts=_charts(report),
        plotlyjs=get_plotlyjs(),
    )  # fmt: skip


def _charts(report: Report) -> dict[str, str]:
    """Each chart as an HTML fragment, by its name."""
    import plotly.io

    return {
        name: plotly.io.to_html(
            figure, include_plotlyjs=False, full_html=False, div_id=f"chart-{name}", validate=False,
            config={"displayModeBar": False, "responsive": True}, default_height=f"{figure['layout']['height']}px",
        )
        for name, figure in figures(report).items()
    }  # fmt: skip
