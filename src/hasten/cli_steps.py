"""The verbs of single steps: each takes a variant folder or a checkpoint, and makes or measures one thing."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from hasten.budget import Budget
from hasten.checkpoint import import_checkpoint
from hasten.cli_options import (
    DISTILL,
    GUIDE,
    PROFILE,
    QUANTIZE,
    TRAIN,
    TRANSFER,
    Augment,
    Epochs,
    Folder,
    GuideEpochs,
    LabelColumn,
    LearningRate,
    Name,
    Objective,
    Out,
    P99Ms,
    Samples,
    Seed,
    Shapes,
    Speedup,
    Student,
    TextColumn,
    Threads,
    Unlabelled,
    one_of,
)
from hasten.pipeline import BASELINE
from hasten.quantization import Calibration, Method, QuantizeOptions
from hasten.teaching import DistillOptions
from hasten.teaching import Objective as Answers
from hasten.workload import read_texts

if TYPE_CHECKING:
    from hasten.variant import Variant
    from hasten.workload import Workload

steps = typer.Typer()


@steps.command(name="import")
def import_(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a fine-tuned sequence classifier.")], out: Out
) -> None:
    """Copy a Hugging Face classifier into a variant folder."""
    sys.stdout.write(f"{import_checkpoint(model, out).path}\n")


@steps.command()
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
    with _variants_of(folders) as variants:
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


@steps.command()
def export(
    folder: Annotated[str, typer.Argument(help="A torch variant or a checkpoint.")], out: Out, name: Name = None,
    runtime: Annotated[str, typer.Option(help="What shall run it: 'onnxruntime' or 'openvino'.")] = "onnxruntime",
) -> None:  # fmt: skip
    """Export to a fused graph, proven equal on padded batches."""
    from hasten import onnx_export, openvino_steps

    one_of("--runtime", runtime, ("onnxruntime", "openvino"))
    step = onnx_export.export if runtime == "onnxruntime" else openvino_steps.export_openvino
    with _variants_of([folder]) as (source,):
        sys.stdout.write(f"{step(source, out, name=name or out.name).path}\n")


@steps.command()
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

    options = QuantizeOptions(
        method=one_of("--method", method, get_args(Method)),
        calibration=one_of("--calibration", calibration, get_args(Calibration)),
        per_channel=per_channel, reduce_range=reduce_range, embeddings=embeddings, smoothing=smoothing,
    )  # fmt: skip
    with _variants_of([str(folder)]) as (source,):
        texts = read_texts(data, text_column=text_column)
        if source.manifest.format == "openvino":
            made = openvino_steps.quantize_openvino(source, out, name=name or out.name, texts=texts)
        else:
            made = quantization.quantize(source, out, options, name=name or out.name, texts=texts)
    sys.stdout.write(f"{made.path}\n")


@steps.command()
def distill(
    teacher: Annotated[str, typer.Argument(help="A torch variant or a checkpoint.")],
    train: Annotated[str, typer.Option(help="Labelled training texts.")],
    shape: Annotated[str, typer.Option(help="The student's layers and width, such as 3x384.")],
    out: Out,
    unlabelled: Unlabelled = None,
    augment: Augment = TRANSFER.augment,
    held_out: Annotated[
        str | None, typer.Option(help="Texts that nothing may come near that is not in --train, such as test data.")
    ] = None,
    student: Student = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    objective: Objective = DISTILL.objective,
    temperature: Annotated[float, typer.Option(help="Softens both distributions.")] = DISTILL.temperature,
    soft_weight: Annotated[float, typer.Option(help="Weight of the teacher's term, 0 to 1.")] = DISTILL.soft_weight,
    guide_epochs: GuideEpochs = GUIDE.epochs,
    epochs: Epochs = TRAIN.epochs,
    learning_rate: LearningRate = TRAIN.learning_rate,
    threads: Threads = PROFILE.threads,
    seed: Seed = TRAIN.seed,
    name: Name = None,
) -> None:
    """Train a smaller student on a teacher's logits; continues where it was interrupted."""
    from hasten import distillation, students, teaching
    from hasten.progress import Bars
    from hasten.transfer import widened

    resolved = replace(PROFILE, threads=threads).resolved_threads
    options = DistillOptions(
        objective=one_of("--objective", objective, get_args(Answers)), temperature=temperature,
        soft_weight=soft_weight, guide=replace(GUIDE, epochs=guide_epochs, learning_rate=learning_rate),
        train=replace(TRAIN, epochs=epochs, learning_rate=learning_rate, seed=seed, threads=resolved),
    )  # fmt: skip
    wanted = replace(TRANSFER, augment=augment, seed=seed)
    work = out.parent / f".{out.name}.work"  # kept until the student stands whole, to go on after an interruption
    with _variants_of([teacher]) as (source,), Bars() as bars:
        data = _read(train, "train", source, text_column, label_column)
        more, guarded = (() if path is None else read_texts(path, text_column=text_column)
                         for path in (unlabelled, held_out))  # fmt: skip
        bars.stage("widening the training texts")
        transfer = widened(source, data.texts, more, guarded, wanted).texts
        bars.stage(f"distilling a student of {shape}")
        whole = source if student is None else import_checkpoint(
            student, work / "source", name="source", new_labels=source.labels, seed=seed
        )  # fmt: skip
        (cut,) = students.parse_shapes(shape, students.shape_of(whole))
        start = students.init_student(whole, cut, work / "start", name="start", seed=seed)
        lesson = teaching.Lesson(
            data=data, transfer=transfer, teacher=source, guide=source,
            layers=students.stand_for(source, start),
        )  # fmt: skip
        made = distillation.distill(
            start, out, options, name=name or out.name, lesson=lesson, work=work, progress=bars.advance
        )
    shutil.rmtree(work)
    sys.stdout.write(f"{made.path}\n")


@steps.command()
def students(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a fine-tuned classifier, or a torch variant.")],
    data: Annotated[str, typer.Option(help="Texts whose lengths are those of the requests; labels not needed.")],
    p99_ms: P99Ms = None,
    speedup: Speedup = None,
    shapes: Shapes = None,
    student: Student = None,
    text_column: TextColumn = None,
    threads: Threads = PROFILE.threads,
    seed: Seed = PROFILE.seed,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON to stdout.")] = False,
) -> None:
    """Measure student shapes on this machine, untrained and in INT8, and say which would be trained for a budget."""
    import msgspec

    from hasten.progress import Bars
    from hasten.report_views import shapes_as_terminal
    from hasten.student_search import measured_shapes

    budget = Budget(p99_ms=p99_ms, speedup=speedup)
    options = replace(PROFILE, threads=threads, seed=seed)
    with _variants_of([model]) as (source,), Bars() as bars, tempfile.TemporaryDirectory(prefix="hasten-") as folder:
        texts = read_texts(data, text_column=text_column)
        cut = source if student is None else import_checkpoint(
            student, Path(folder) / "student", name="student", new_labels=source.labels, seed=seed
        )  # fmt: skip
        bars.stage("measuring student shapes before training")
        rows = measured_shapes(source, cut, texts, shapes, budget, options, Path(folder))
    if json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode() + "\n")
    else:
        width = min(140, shutil.get_terminal_size((100, 24)).columns)
        sys.stdout.write(shapes_as_terminal(rows, budget, width=width, color=sys.stdout.isatty()))


@steps.command()
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


def _read(data: str, name: str, variant: Variant, text_column: str | None, label_column: str | None) -> Workload:
    from hasten.workload import read_workload

    return read_workload(data, name=name, labels=variant.labels, text_column=text_column, label_column=label_column)


@contextmanager
def _variants_of(sources: list[str]) -> Generator[list[Variant]]:
    """Opens variant folders; a checkpoint that is none yet is imported into a folder that goes away again."""
    from hasten.variant import MANIFEST, open_variant

    with tempfile.TemporaryDirectory(prefix="hasten-") as folder:
        yield [
            open_variant(source) if (Path(source) / MANIFEST).is_file()
            else import_checkpoint(source, Path(folder) / str(number), name=Path(source).name or BASELINE)
            for number, source in enumerate(sources)
        ]  # fmt: skip
