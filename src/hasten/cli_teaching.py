"""The verbs about students: which one would be trained, and training one."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from hasten.budget import Budget
from hasten.checkpoint import import_checkpoint
from hasten.cli_inputs import labelled, variants_of
from hasten.cli_options import (
    DISTILL,
    GUIDE,
    OPTIMIZE,
    PROFILE,
    TRAIN,
    TRANSFER,
    Augment,
    Epochs,
    Force,
    GuideEpochs,
    LabelColumn,
    Layers,
    LearningRate,
    Minutes,
    Name,
    Objective,
    Out,
    P99Ms,
    Products,
    Seed,
    Shapes,
    Speedup,
    Student,
    TextColumn,
    Threads,
    Unlabelled,
    name_of,
    one_of,
    precision_of,
)
from hasten.errors import UsageError
from hasten.files import beside
from hasten.optimize_options import Layers as LayerChoice
from hasten.teaching import DistillOptions
from hasten.teaching import Objective as Answers
from hasten.workload import read_texts

if TYPE_CHECKING:
    from hasten.progress import Bars
    from hasten.teaching import Lesson
    from hasten.training_plan import TrainingPlan
    from hasten.transfer import TransferOptions
    from hasten.variant import Variant

teaching = typer.Typer()


@teaching.command()
def distill(
    teacher: Annotated[str, typer.Argument(help="A torch variant or a checkpoint.")],
    train: Annotated[str, typer.Option(help="Labelled training texts.")],
    shape: Annotated[str, typer.Option(help="The student's layers and width, such as 3x384.")],
    out: Out,
    unlabelled: Unlabelled = None,
    augment: Augment = TRANSFER.augment,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Texts, such as test data: of --unlabelled and new ones, what nearly equals one is left out."
        ),
    ] = None,
    student: Student = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    objective: Objective = DISTILL.objective,
    temperature: Annotated[float, typer.Option(help="Softens both distributions.")] = DISTILL.temperature,
    soft_weight: Annotated[float, typer.Option(help="Weight of the teacher's term, 0 to 1.")] = DISTILL.soft_weight,
    guide_epochs: GuideEpochs = GUIDE.epochs,
    minutes: Minutes = OPTIMIZE.minutes,
    layers: Layers = OPTIMIZE.layers,
    force: Force = DISTILL.force,
    epochs: Epochs = TRAIN.epochs,
    learning_rate: LearningRate = TRAIN.learning_rate,
    products: Products = None,
    threads: Threads = PROFILE.threads,
    seed: Seed = TRAIN.seed,
    name: Name = None,
) -> None:
    """Train a smaller student on a teacher's logits; continues where it was interrupted."""
    from hasten import distillation
    from hasten.progress import Bars
    from hasten.students import stand_for
    from hasten.teaching import Lesson
    from hasten.training_plan import check_minutes
    from hasten.variant import check_place

    check_minutes(minutes, guided=guide_epochs > 0)
    check_place(out)
    name = name_of(out, name)
    training = replace(TRAIN, epochs=epochs, learning_rate=learning_rate, seed=seed, precision=precision_of(products))
    options = DistillOptions(
        objective=one_of("--objective", objective, get_args(Answers)), temperature=temperature, force=force,
        soft_weight=soft_weight, guide=replace(GUIDE, epochs=guide_epochs, learning_rate=learning_rate),
        train=replace(training, threads=replace(PROFILE, threads=threads).resolved_threads),
    )  # fmt: skip
    wanted = replace(TRANSFER, augment=augment, seed=seed)
    work = out.parent / f".{out.name}.work"  # kept until the student stands whole, to go on after an interruption
    with variants_of([teacher]) as (source,), Bars() as bars:
        data = labelled(train, "train", source, text_column, label_column)
        more = () if unlabelled is None else read_texts(unlabelled, text_column=text_column)
        guarded = () if held_out is None else read_texts(held_out, name="test", text_column=text_column)
        whole = source if student is None else import_checkpoint(
            student, work / "source", name="source", new_labels=source.labels, seed=seed
        )  # fmt: skip
        spaced = one_of("--layers", layers, get_args(LayerChoice)) == "spaced"
        start = _student_start(whole, shape, () if spaced else data.texts, work / "start", seed)
        lesson = Lesson(data=data, transfer=tuple(more), teacher=source, guide=source, layers=stand_for(source, start))
        lesson, options = _widened(source, start, lesson, options, wanted, guarded, minutes, work, bars)
        bars.stage(f"distilling a student of {shape}")
        made = distillation.distill(start, out, options, name=name, lesson=lesson, work=work, progress=bars.advance)
    work.rename(done := beside(work, "old"))  # whole or not at all: what is half removed cannot be gone on with
    shutil.rmtree(done)
    sys.stdout.write(f"{made.path}\n")


def _widened(
    source: Variant, start: Variant, lesson: Lesson, options: DistillOptions, wanted: TransferOptions,
    guarded: Sequence[str], minutes: float | None, work: Path, bars: Bars,
) -> tuple[Lesson, DistillOptions]:  # fmt: skip
    """The lesson with its transfer set, and the options with the passes that the minutes leave time for."""
    from hasten.training_plan import refitted
    from hasten.transfer import widened

    plan = None
    if minutes is not None:
        bars.stage("planning the minutes")
        plan = _planned(minutes, start, lesson, guarded, options, work)
        wanted = replace(wanted, augment=plan.augment)
        bars.stage(str(plan))
    bars.stage("widening the training texts")
    lesson = replace(lesson, transfer=widened(source, lesson.data.texts, lesson.transfer, guarded, wanted).texts)
    if plan is not None:
        epochs = refitted(plan, len(lesson.texts)).epochs
        options = replace(options, train=replace(options.train, epochs=epochs))
    return lesson, options


def _student_start(whole: Variant, shape: str, texts: Sequence[str], out: Path, seed: int) -> Variant:
    """An untrained student; with texts, from the layers that change them most."""
    from hasten.layer_choice import layer_influences, most_influential
    from hasten.students import init_student, parse_shapes, shape_of

    cuts = parse_shapes(shape, shape_of(whole))
    if len(cuts) != 1:
        raise UsageError(f"--shape is one shape, such as 2x128, not {shape}")
    cut = cuts[0]
    layers = most_influential(layer_influences(whole, texts), cut.layers) if texts else None
    return init_student(whole, cut, out, name=out.name, layers=layers, seed=seed)


def _planned(
    minutes: float, start: Variant, lesson: Lesson, guarded: Sequence[str], options: DistillOptions, work: Path
) -> TrainingPlan:
    """How the minutes are spent; what was planned once stays, so that an interrupted run ends the same."""
    import msgspec

    from hasten.files import write_atomically
    from hasten.measurement import this_host
    from hasten.teaching import answered_texts
    from hasten.training_plan import TrainingPlan, measured_speeds, plan_training, wanted_epochs
    from hasten.transfer import TransferOptions, guarding_seconds
    from hasten.workshop import make_key

    machine = (this_host().cpu, this_host().cores)
    key = make_key(start.digest, *lesson.identity, options, minutes, list(guarded), machine)
    path = work / f"plan-{key[:16]}.json"
    if not path.is_file():
        new_s = guarding_seconds(lesson.texts, guarded, TransferOptions().nearly_equal)
        speeds = replace(measured_speeds(start, lesson, options), new_s=new_s)
        answered = answered_texts(lesson.teacher, lesson.texts, work) if lesson.teacher else 0
        plan = plan_training(
            minutes, speeds, labelled=len(lesson.data), wanted=wanted_epochs(len(lesson.data), len(start.labels)),
            unlabelled=len(lesson.transfer), answered=answered,
        )  # fmt: skip
        write_atomically(path, msgspec.json.encode(plan))
    return msgspec.json.decode(path.read_bytes(), type=TrainingPlan)


@teaching.command()
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
    with variants_of([model]) as (source,), Bars() as bars, tempfile.TemporaryDirectory(prefix="hasten-") as folder:
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
