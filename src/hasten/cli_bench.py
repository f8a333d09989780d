"""The verb `bench`: what a server holds."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli_options import LOAD, Seed, TextColumn
from hasten.errors import MissingExtraError
from hasten.files import write_atomically
from hasten.workload import read_texts

if TYPE_CHECKING:
    from hasten.load import Load

bench_app = typer.Typer()


@bench_app.command()
def bench(
    url: Annotated[str, typer.Argument(help="Where the server is, such as http://127.0.0.1:8000.")],
    texts: Annotated[str, typer.Option(help="Texts to ask; labels not needed.")],
    rate: Annotated[
        float, typer.Option(help="Requests a second, on average; with --find-max, where it starts.")
    ] = LOAD.rate,
    seconds: Annotated[float, typer.Option(help="For how long; with --find-max, each trial.")] = LOAD.seconds,
    p99_ms: Annotated[float, typer.Option(help="Within how many milliseconds an answer is good.")] = LOAD.p99_ms,
    find_max: Annotated[bool, typer.Option("--find-max", help="Look for the highest rate whose p99 holds.")] = False,
    histogram: Annotated[
        Path | None, typer.Option(help="File for the latencies as an HdrHistogram percentile distribution.")
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(
            help="Header of each request, such as 'Authorization: Bearer …'; may be repeated. Other users of the "
            "machine can read a command line."
        ),
    ] = None,
    text_column: TextColumn = None,
    seed: Seed = LOAD.seed,
    json: Annotated[bool, typer.Option("--json", help="Print every sample as JSON to stdout.")] = False,
) -> None:
    """Offer an open-loop Poisson load to a server; say what was answered in time, late, refused and failed.

    Exit status: 0 the p99 holds (with --find-max, at some rate), 3 it does not, 1 error, 2 usage.
    """
    import msgspec

    from hasten import load

    if find_spec("datasets") is None:
        raise MissingExtraError("datasets", "bench")
    options = replace(LOAD, rate=rate, seconds=seconds, p99_ms=p99_ms, seed=seed, headers=tuple(header or ()))
    asked = read_texts(texts, text_column=text_column)
    if histogram is not None:
        load.histogram([])  # what is missing is said before anything is measured
    load.require_up(url, asked[0], options)
    own_ms = load.overhead_ms(seed)

    def try_rate(offered: float) -> Load:
        return load.offer(url, asked, replace(options, rate=offered))

    trials = load.find_max(try_rate, rate, seconds) if find_max else [try_rate(rate)]
    best = load.highest(trials)
    if json:
        sys.stdout.write(msgspec.json.encode(trials).decode() + "\n")
    else:
        sys.stdout.write(_shown(trials, own_ms.value))
        found = "no offered rate is shown to keep it" if best is None else f"holds at {best.rate:.1f} requests a second"
        few = "" if trials[-1].offered >= load.DECIDING else f"; fewer than {load.DECIDING} requests cannot show it"
        if find_max and best is None:
            few = f"; in --seconds {seconds:g} none below {load.EXPECTED / seconds:.0f} a second can be tried"
        sys.stdout.write(f"p99 of {p99_ms:g} ms: {found}{few}.\n")
    if histogram is not None:
        distribution = io.BytesIO()
        load.histogram((best or trials[-1]).latencies_ms).output_percentile_distribution(distribution, 1000.0)
        write_atomically(histogram, distribution.getvalue())
    raise SystemExit(3 if best is None else 0)


def _shown(trials: Sequence[Load], own_ms: float) -> str:
    """The trials as a table, and what the generator adds."""
    from hasten.report_views import trials_as_terminal

    width = min(140, shutil.get_terminal_size((100, 24)).columns)
    table = trials_as_terminal(trials, width=width, color=sys.stdout.isatty())
    return f"{table}The generator itself: {own_ms:.2f} ms at the median, against a server that does nothing.\n"
