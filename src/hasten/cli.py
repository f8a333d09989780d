"""The command line: flags become a dataclass, a dataclass becomes one call.

The libraries that do the work are imported when a verb runs, so that `hasten --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from hasten.budget import Budget, Gate
from hasten.cli_bench import bench_app
from hasten.cli_options import (
    DISTILL,
    GUIDE,
    OPTIMIZE,
    PROFILE,
    SERVE,
    TRAIN,
    TRANSFER,
    Augment,
    Epochs,
    Folder,
    Force,
    GuideEpochs,
    Json,
    LabelColumn,
    Layers,
    LearningRate,
    Minutes,
    Objective,
    Out,
    P99Ms,
    Products,
    Samples,
    Seed,
    Seeds,
    Shapes,
    Speedup,
    Student,
    TextColumn,
    Threads,
    Unlabelled,
    one_of,
    precision_of,
)
from hasten.cli_steps import steps
from hasten.cli_teaching import teaching
from hasten.errors import HastenError
from hasten.logs import log_as_server, log_to_stderr
from hasten.optimize_options import Layers as LayerChoice
from hasten.pipeline import Inputs
from hasten.teaching import Objective as Answers

if TYPE_CHECKING:
    from hasten.report import Report

MISSED = 3
CURL = """        curl -s http://127.0.0.1:8000/predict -H 'content-type: application/json' \\
             -d '{"inputs": "Shares in the chip maker rose after it raised its profit forecast."}'
"""
app = typer.Typer(
    name="hasten",
    help="Make a fine-tuned transformer classifier meet a latency budget on a CPU, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


app.add_typer(steps)
app.add_typer(teaching)
app.add_typer(bench_app)


@app.callback()
def _root(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more to stderr.")] = False) -> None:
    log_to_stderr(logging.INFO if verbose else logging.WARNING)


@app.command()
def optimize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a fine-tuned sequence classifier.")],
    train: Annotated[str, typer.Option(help="Training data: CSV, TSV, JSON-lines, Parquet, or hub ID:CONFIG@SPLIT.")],
    test: Annotated[str, typer.Option(help="Test data, used once, for the numbers that are reported.")],
    out: Out,
    valid: Annotated[
        str | None, typer.Option(help="Validation data, for choosing; split from train if not given.")
    ] = None,
    valid_rows: Annotated[
        int, typer.Option(help="Most validation rows; drawn if there are more.")
    ] = OPTIMIZE.valid_rows,
    p99_ms: P99Ms = None,
    speedup: Speedup = None,
    retain: Annotated[float, typer.Option(help="Share of the accuracy to keep.")] = OPTIMIZE.budget.retain,
    gate: Annotated[
        str, typer.Option(help="Judge by the one-sided 95 % 'bound' or by the 'point' estimate.")
    ] = OPTIMIZE.budget.gate,
    max_lost_points: Annotated[
        float, typer.Option(min=0, help="Points of accuracy that a lower precision may lose against fp32.")
    ] = OPTIMIZE.max_lost_points,
    every_step: Annotated[
        bool, typer.Option("--all", help="Run every step, even after the budget is met.")
    ] = OPTIMIZE.every_step,
    strict: Annotated[bool, typer.Option(help="Fail when a text stands in two splits.")] = OPTIMIZE.strict,
    student: Student = None,
    openvino: Annotated[
        bool | None, typer.Option(help="OpenVINO's variants too; taken where the extra is installed if not given.")
    ] = OPTIMIZE.openvino,
    simple: Annotated[
        bool, typer.Option(help="TF-IDF with logistic regression and static embeddings too, before any student.")
    ] = OPTIMIZE.simple,
    shapes: Shapes = OPTIMIZE.shapes,
    unlabelled: Unlabelled = None,
    augment: Augment = TRANSFER.augment,
    objective: Objective = DISTILL.objective,
    guide_epochs: GuideEpochs = GUIDE.epochs,
    minutes: Minutes = OPTIMIZE.minutes,
    layers: Layers = OPTIMIZE.layers,
    seeds: Seeds = OPTIMIZE.seeds,
    force: Force = DISTILL.force,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    epochs: Epochs = TRAIN.epochs,
    learning_rate: LearningRate = TRAIN.learning_rate,
    products: Products = None,
    samples: Samples = PROFILE.samples,
    threads: Threads = PROFILE.threads,
    seed: Seed = OPTIMIZE.seed,
    json: Json = False,
) -> None:
    """Go the whole road, from a fine-tuned classifier to a proven, servable artifact.

    Exit status: 0 the budget is met, 3 missed or undecided, 1 error, 2 usage.
    """
    from hasten import pipeline
    from hasten.progress import Bars

    budget = Budget(p99_ms=p99_ms, speedup=speedup, retain=retain, gate=one_of("--gate", gate, get_args(Gate)))
    distill_options = replace(
        DISTILL, objective=one_of("--objective", objective, get_args(Answers)), force=force,
        guide=replace(GUIDE, epochs=guide_epochs, learning_rate=learning_rate),
        train=replace(TRAIN, epochs=epochs, learning_rate=learning_rate, precision=precision_of(products)),
    )  # fmt: skip
    options = replace(
        OPTIMIZE, budget=budget, every_step=every_step, strict=strict, shapes=shapes, seed=seed, openvino=openvino,
        minutes=minutes, simple=simple, layers=one_of("--layers", layers, get_args(LayerChoice)), seeds=seeds,
        profile=replace(PROFILE, samples=samples, threads=threads, seed=seed),
        distill=distill_options, transfer=replace(TRANSFER, augment=augment), valid_rows=valid_rows,
        max_lost_points=max_lost_points,
    )  # fmt: skip
    inputs = Inputs(
        model=model, train=train, test=test, valid=valid, unlabelled=unlabelled, student=student,
        text_column=text_column, label_column=label_column, command=shlex.join(["hasten", *sys.argv[1:]]),
    )  # fmt: skip
    with Bars() as bars:
        result = pipeline.optimize(inputs, out, options, bars)
    _finish(result, out, json)


def _finish(report: Report, out: Path, json: bool, more: str = "") -> None:
    from hasten.report_render import render

    if json:
        sys.stdout.write(render(report, "json"))
    else:
        width = min(140, _terminal_width())
        sys.stdout.write(render(report, "terminal", width=width, color=sys.stdout.isatty()))
        sys.stdout.write(f"\nReport: {out / 'report.html'}\n")
        if report.chosen is not None:
            program = "hasten" if shutil.which("hasten") else sys.argv[0]  # where no environment is active
            sys.stdout.write(f"Serve:  {program} serve {out / 'chosen'}\n{more}")
    raise typer.Exit(0 if report.verdict == "met" else MISSED)


def _terminal_width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a run.")],
    json: Json = False,
) -> None:
    """Make the report of a run again from its measurements."""
    from hasten.pipeline import report_again

    _finish(report_again(out), out, json)


@app.command()
def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = SERVE.host,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = SERVE.port,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads of one inference; the folder's measured plan says if neither this nor --workers is given."
        ),
    ] = SERVE.threads,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Inferences at the same time; the folder's measured plan says if neither this nor --threads is given."
        ),
    ] = SERVE.workers,
    processes: Annotated[int, typer.Option(help="Processes that share the port and the cores.")] = SERVE.processes,
    p99_ms: Annotated[
        float | None,
        typer.Option(help="Deadline of a request that names none, in milliseconds; what cannot keep it gets 429."),
    ] = SERVE.p99_ms,
    max_batch: Annotated[int, typer.Option(help="Most texts in one inference, fewer of long ones.")] = SERVE.max_batch,
    max_queue: Annotated[int, typer.Option(help="Most texts waiting; what goes beyond is refused.")] = SERVE.max_queue,
    traces: Annotated[
        bool, typer.Option("--traces", help="Trace requests by OpenTelemetry; OTEL_* variables say where to.")
    ] = SERVE.traces,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line.")] = False,
) -> None:
    """Serve a variant over HTTP: POST /predict, GET /metrics, a page at /, its API at /docs; SIGHUP loads it anew."""
    from hasten.processes import serve as serve_folder

    set_up_logs = partial(log_as_server, logging.getLogger().level, json=log_json)
    set_up_logs()
    options = replace(
        SERVE,
        host=host,
        port=port,
        threads=threads,
        workers=workers,
        processes=processes,
        p99_ms=p99_ms,
        max_batch=max_batch,
        max_queue=max_queue,
        traces=traces,
    )
    serve_folder(folder, options, set_up_logs)


@app.command()
def demo(
    out: Out = Path("hasten-demo"),
    speedup: Annotated[float, typer.Option(help="Lowest speed-up of the median latency.")] = 13.2,
    retain: Annotated[float, typer.Option(help="Share of the accuracy to keep.")] = OPTIMIZE.budget.retain,
    threads: Threads = PROFILE.threads,
) -> None:
    """Run the whole road on a model and texts that come as packages (extra demo)."""
    from hasten import pipeline
    from hasten.demo import SHAPES, STUDENT_EPOCHS, prepare
    from hasten.progress import Bars

    profile_options = replace(PROFILE, threads=threads)
    budget = Budget(speedup=speedup, retain=retain)
    distill_options = replace(DISTILL, train=replace(TRAIN, epochs=STUDENT_EPOCHS, precision=precision_of(None)))
    options = replace(
        OPTIMIZE, budget=budget, every_step=True, shapes=SHAPES, openvino=False, simple=False,
        profile=profile_options, distill=distill_options,
    )  # fmt: skip
    with Bars() as bars:
        inputs = prepare(out, profile_options.resolved_threads, bars)
        command = ["hasten", "optimize", inputs.model, "--train", inputs.train, "--test", inputs.test]
        command += ["--valid", str(inputs.valid)]
        command += ["--speedup", f"{speedup:g}", "--retain", f"{retain:g}", "--all", "--shapes", SHAPES]
        command += [] if threads is None else ["--threads", str(threads)]
        command += ["--epochs", str(STUDENT_EPOCHS), "--no-openvino", "--no-simple", "--out", str(out / "run")]
        result = pipeline.optimize(replace(inputs, command=shlex.join(command)), out / "run", options, bars)
    _finish(result, out / "run", json=False, more=CURL)


def main() -> None:
    """Runs the command line; errors that hasten foresees become one line on stderr and their exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except HastenError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a file that cannot be read or written, named in it
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
