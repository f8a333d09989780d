"""The command line: flags become a dataclass, a dataclass becomes one call.

The libraries that do the work are imported when a verb runs, so that `hasten --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from hasten.budget import Budget, Gate
from hasten.cli_options import (
    DISTILL,
    OPTIMIZE,
    PROFILE,
    QUANTIZE,
    SERVE,
    TRAIN,
    Epochs,
    Folder,
    Json,
    LabelColumn,
    LearningRate,
    Name,
    Out,
    Samples,
    Seed,
    TextColumn,
    Threads,
)
from hasten.distillation import DistillOptions
from hasten.errors import HastenError, UsageError
from hasten.pipeline import BASELINE, Inputs
from hasten.quantization import Calibration, Method, QuantizeOptions

if TYPE_CHECKING:
    from hasten.report import Report
    from hasten.variant import Variant
    from hasten.workload import Workload

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


@app.callback()
def _root(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more to stderr.")] = False) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


@app.command()
def optimize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a fine-tuned sequence classifier.")],
    train: Annotated[str, typer.Option(help="Training data: CSV, TSV, JSON-lines, Parquet, or hub ID:CONFIG@SPLIT.")],
    test: Annotated[str, typer.Option(help="Test data, used once, for the numbers that are reported.")],
    out: Out,
    valid: Annotated[
        str | None, typer.Option(help="Validation data, for choosing; split from train if not given.")
    ] = None,
    p99_ms: Annotated[float | None, typer.Option(help="Highest p99 latency of a request, in milliseconds.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Lowest speed-up of the median latency.")] = None,
    retain: Annotated[float, typer.Option(help="Share of the accuracy to keep.")] = OPTIMIZE.budget.retain,
    gate: Annotated[
        str, typer.Option(help="Judge by the one-sided 95 % 'bound' or by the 'point' estimate.")
    ] = OPTIMIZE.budget.gate,
    every_step: Annotated[
        bool, typer.Option("--all", help="Run every step, even after the budget is met.")
    ] = OPTIMIZE.every_step,
    strict: Annotated[bool, typer.Option(help="Fail when a text stands in two splits.")] = OPTIMIZE.strict,
    student: Annotated[str | None, typer.Option(help="Small checkpoint to start the student from.")] = None,
    openvino: Annotated[
        bool | None, typer.Option(help="OpenVINO's variants too; taken where the extra is installed if not given.")
    ] = OPTIMIZE.openvino,
    shapes: Annotated[
        str | None, typer.Option(help="Student shapes to consider, such as 2x128,3x384.")
    ] = OPTIMIZE.shapes,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    epochs: Epochs = TRAIN.epochs,
    learning_rate: LearningRate = TRAIN.learning_rate,
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

    budget = Budget(p99_ms=p99_ms, speedup=speedup, retain=retain, gate=_one_of("--gate", gate, get_args(Gate)))
    train_options = replace(TRAIN, epochs=epochs, learning_rate=learning_rate)
    options = replace(
        OPTIMIZE, budget=budget, every_step=every_step, strict=strict, shapes=shapes, seed=seed, openvino=openvino,
        profile=replace(PROFILE, samples=samples, threads=threads, seed=seed),
        distill=replace(DISTILL, train=train_options),
    )  # fmt: skip
    inputs = Inputs(
        model=model, train=train, test=test, valid=valid, student=student, text_column=text_column,
        label_column=label_column, command=shlex.join(["hasten", *sys.argv[1:]]),
    )  # fmt: skip
    with Bars() as bars:
        result = pipeline.optimize(inputs, out, options, bars)
    _finish(result, out, json)


def _one_of(option: str, text: str, choices: tuple[Any, ...]) -> Any:
    if text not in choices:
        raise UsageError(f"{option} is {' or '.join(map(repr, choices))}, not {text!r}")
    return text


def _finish(report: Report, out: Path, json: bool, more: str = "") -> None:
    from hasten.report_render import render

    if json:
        sys.stdout.write(render(report, "json"))
    else:
        width = min(140, _terminal_width())
        sys.stdout.write(render(report, "terminal", width=width, color=sys.stdout.isatty()))
        sys.stdout.write(f"\nReport: {out / 'report.html'}\n")
        if report.chosen is not None:
            sys.stdout.write(f"Serve:  hasten serve {out / 'chosen'}\n{more}")
    raise typer.Exit(0 if report.verdict == "met" else MISSED)


def _terminal_width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


@app.command(name="import")
def import_(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a fine-tuned sequence classifier.")], out: Out
) -> None:
    """Copy a Hugging Face classifier into a variant folder."""
    from hasten.checkpoint import import_checkpoint

    sys.stdout.write(f"{import_checkpoint(model, out).path}\n")


@app.command()
def profile(
    folders: Annotated[list[str], typer.Argument(help="Variant folders or checkpoints; the first is the baseline.")],
    data: Annotated[str, typer.Option(help="Labelled texts to measure on.")],
    out: Out,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    samples: Samples = PROFILE.samples,
    threads: Threads = PROFILE.threads,
    seed: Seed = PROFILE.seed,
) -> None:
    """Measure variants in one interleaved run; write one JSON file each into OUT/measurements.

    How best to share out the cores is measured too and recorded in each variant's folder, for the server.
    """
    from hasten import profiling, thread_plan
    from hasten.measurement import save_measurement
    from hasten.progress import Bars

    options = replace(PROFILE, samples=samples, threads=threads, seed=seed)
    with _variants(folders) as variants:
        workload = _read(data, "test", variants[0], text_column, label_column)
        with Bars() as bars:
            bars.stage("measuring, interleaved")
            measured = profiling.profile(variants, workload, options, scenario="test", progress=bars.advance)
            for variant in (v for v in variants if v.manifest.format != "torch"):
                bars.stage(f"measuring how {variant.name} shares out the cores")
                plan = thread_plan.measure_plan(variant, workload.texts, bars.advance)
                thread_plan.record_plan(variant, plan)
    for measurement in measured:
        sys.stdout.write(f"{save_measurement(measurement, out / 'measurements')}\n")


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="A torch variant or a checkpoint.")], out: Out, name: Name = None,
    runtime: Annotated[str, typer.Option(help="What shall run it: 'onnxruntime' or 'openvino'.")] = "onnxruntime",
) -> None:  # fmt: skip
    """Export to a fused graph, proven equal on padded batches."""
    from hasten import onnx_export, openvino_steps

    _one_of("--runtime", runtime, ("onnxruntime", "openvino"))
    step = onnx_export.export if runtime == "onnxruntime" else openvino_steps.export_openvino
    with _variants([folder]) as (source,):
        sys.stdout.write(f"{step(source, out, name=name or out.name).path}\n")


@app.command()
def quantize(
    folder: Folder,
    out: Out,
    data: Annotated[str, typer.Option(help="Texts to calibrate on and to measure the change on; labels not needed.")],
    text_column: TextColumn = None,
    method: Annotated[
        str, typer.Option(help="Scales of activations: 'static', by calibration, or 'dynamic', by each batch.")
    ] = QUANTIZE.method,
    calibration: Annotated[
        str, typer.Option(help="Ranges that calibration keeps: 'minmax', 'percentile' or 'entropy'.")
    ] = QUANTIZE.calibration,
    per_channel: Annotated[bool, typer.Option(help="One weight scale an output channel.")] = QUANTIZE.per_channel,
    reduce_range: Annotated[
        bool | None, typer.Option(help="7-bit weights; taken on a CPU without VNNI if not given.")
    ] = QUANTIZE.reduce_range,
    embeddings: Annotated[bool, typer.Option(help="Embedding tables in INT8 too.")] = QUANTIZE.embeddings,
    smoothing: Annotated[
        float, typer.Option(help="How much of the activations' outliers moves into the weights, 0 to 1.")
    ] = QUANTIZE.smoothing,
    name: Name = None,
) -> None:
    """Quantize a fp32 variant to INT8; an OpenVINO one as NNCF does, whatever the other options."""
    from hasten import openvino_steps, quantization
    from hasten.workload import read_texts

    options = QuantizeOptions(
        method=_one_of("--method", method, get_args(Method)),
        calibration=_one_of("--calibration", calibration, get_args(Calibration)),
        per_channel=per_channel, reduce_range=reduce_range, embeddings=embeddings, smoothing=smoothing,
    )  # fmt: skip
    with _variants([str(folder)]) as (source,):
        texts = read_texts(data, text_column=text_column)
        if source.manifest.format == "openvino":
            made = openvino_steps.quantize_openvino(source, out, name=name or out.name, texts=texts)
        else:
            made = quantization.quantize(source, out, options, name=name or out.name, texts=texts)
    sys.stdout.write(f"{made.path}\n")


@app.command()
def distill(
    teacher: Annotated[str, typer.Argument(help="A torch variant or a checkpoint.")],
    train: Annotated[str, typer.Option(help="Labelled training texts.")],
    shape: Annotated[str, typer.Option(help="The student's layers and width, such as 3x384.")],
    out: Out,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    temperature: Annotated[float, typer.Option(help="Softens both distributions.")] = DISTILL.temperature,
    soft_weight: Annotated[float, typer.Option(help="Weight of the teacher's term, 0 to 1.")] = DISTILL.soft_weight,
    epochs: Epochs = TRAIN.epochs,
    learning_rate: LearningRate = TRAIN.learning_rate,
    threads: Threads = PROFILE.threads,
    seed: Seed = TRAIN.seed,
    name: Name = None,
) -> None:
    """Train a smaller student on a teacher's logits; continues where it was interrupted."""
    from hasten import distillation, students
    from hasten.progress import Bars

    resolved = replace(PROFILE, threads=threads).resolved_threads
    training = replace(TRAIN, epochs=epochs, learning_rate=learning_rate, seed=seed, threads=resolved)
    options = DistillOptions(temperature=temperature, soft_weight=soft_weight, train=training)
    work = out.parent / f".{out.name}.work"  # kept until the student stands whole, to go on after an interruption
    with _variants([teacher]) as (source,), Bars() as bars:
        bars.stage(f"distilling a student of {shape}")
        data = _read(train, "train", source, text_column, label_column)
        (wanted,) = students.parse_shapes(shape, students.shape_of(source))
        start = students.init_student(source, wanted, work / "start", name="start", seed=seed)
        made = distillation.distill(
            start, out, options, name=name or out.name, data=data, teacher=source, work=work, progress=bars.advance
        )
    shutil.rmtree(work)
    sys.stdout.write(f"{made.path}\n")


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
        int | None, typer.Option(help="Threads of one inference; the folder's measured plan says if not given.")
    ] = SERVE.threads,
    workers: Annotated[
        int | None, typer.Option(help="Inferences at the same time; the folder's measured plan says if not given.")
    ] = SERVE.workers,
    max_batch: Annotated[int, typer.Option(help="Most texts in one inference.")] = SERVE.max_batch,
    max_queue: Annotated[int, typer.Option(help="Most texts waiting; what goes beyond is refused.")] = SERVE.max_queue,
) -> None:
    """Serve a variant over HTTP: POST /predict, GET /health, GET /metrics."""
    from hasten import server

    logging.getLogger("hasten").setLevel(logging.INFO)
    options = replace(
        SERVE, host=host, port=port, threads=threads, workers=workers, max_batch=max_batch, max_queue=max_queue
    )
    server.serve(folder, options)


@app.command()
def verify(folder: Folder) -> None:
    """Check every hash of a variant folder and replay the logits recorded when it was made."""
    from hasten.golden import other_machine, replay_golden
    from hasten.variant import open_variant

    variant = open_variant(folder)
    difference = replay_golden(variant)
    sys.stdout.write(f"{variant.name}: {len(variant.manifest.files)} files as written, digest {variant.digest[:16]}, "
                     f"golden logits replayed to within {difference:.2g}\n")  # fmt: skip
    for sentence in other_machine(variant):
        sys.stdout.write(f"{sentence}\n")


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
    distill_options = replace(DISTILL, train=replace(TRAIN, epochs=STUDENT_EPOCHS))
    options = replace(
        OPTIMIZE, budget=budget, every_step=True, shapes=SHAPES, openvino=False,
        profile=profile_options, distill=distill_options,
    )  # fmt: skip
    with Bars() as bars:
        inputs = prepare(out, profile_options.resolved_threads, bars)
        command = ["hasten", "optimize", inputs.model, "--train", inputs.train, "--test", inputs.test]
        command += ["--valid", str(inputs.valid)]
        command += ["--speedup", f"{speedup:g}", "--retain", f"{retain:g}", "--all", "--shapes", SHAPES]
        command += ["--epochs", str(STUDENT_EPOCHS), "--out", str(out / "run")]
        result = pipeline.optimize(replace(inputs, command=shlex.join(command)), out / "run", options, bars)
    _finish(result, out / "run", json=False, more=CURL)


def _read(data: str, name: str, variant: Variant, text_column: str | None, label_column: str | None) -> Workload:
    from hasten.workload import read_workload

    return read_workload(data, name=name, labels=variant.labels, text_column=text_column, label_column=label_column)


@contextmanager
def _variants(sources: list[str]) -> Generator[list[Variant]]:
    """Opens variant folders; a checkpoint that is none yet is imported into a folder that goes away again."""
    from hasten.checkpoint import import_checkpoint
    from hasten.variant import MANIFEST, open_variant

    with tempfile.TemporaryDirectory(prefix="hasten-") as folder:
        yield [
            open_variant(source) if (Path(source) / MANIFEST).is_file()
            else import_checkpoint(source, Path(folder) / str(number), name=Path(source).name or BASELINE)
            for number, source in enumerate(sources)
        ]  # fmt: skip


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
