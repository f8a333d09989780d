"""How far students go: a base-size teacher, a speed-up and a share of its accuracy to keep, several seeds.

    python benchmarks/students.py TASK TEACHER_OUT OUT [--speedup S] [--minutes M] [--batch B] [--learning-rate R]
        [--shapes LIST] [--seeds N]

TASK is `sst2-mpnet` or `clinc150-mpnet`; TEACHER_OUT is the folder that `teachers.py` made of it. The baseline is that
classifier in eager PyTorch. Each goal is one run of `optimize` that starts the student from the packaged 6x384 encoder
and takes the largest shape whose latency, measured before any training, keeps the budget. Everything is chosen on the
validation split; the test data are read once a goal, at its end.
Interrupted and started again, it goes on. Results go to `results/students_<task>_<speed-up>x.json` and `.md`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from hasten.budget import Budget
from hasten.measurement import load_measurement
from hasten.mixed_precision import native_precision
from hasten.pipeline import Inputs, OptimizeOptions, optimize
from hasten.progress import Bars
from hasten.report_render import render
from hasten.torch_training import TrainOptions, device
from provenance import HERE, save_result
from teachers import packaged_encoder

SHAPES = "2x128,2x192,3x192,4x192,2x256,3x256,2x384,3x384,4x384,5x384,6x384f1024,6x384"
SEEDS = 3
MINUTES = 20.0
BATCH = 64
LEARNING_RATE = 4e-4
GOALS = {
    "sst2-mpnet": (Budget(speedup=25, retain=0.99), Budget(speedup=50, retain=0.98)),
    "clinc150-mpnet": (Budget(speedup=50, retain=0.99),),
}


def main(  # noqa: PLR0913, PLR0917 (a parameter for each option of the command line)
    task: str,
    teacher: Path,
    out: Path,
    speedup: Annotated[float | None, typer.Option(help="The goal of this speed-up alone; without it, all.")] = None,
    minutes: Annotated[
        float, typer.Option(help="For each student, but for answers that earlier steps asked for.")
    ] = MINUTES,
    batch: Annotated[int, typer.Option(help="Texts a step.")] = BATCH,
    learning_rate: Annotated[float, typer.Option(help="Peak of the students' schedule.")] = LEARNING_RATE,
    shapes: Annotated[str, typer.Option(help="To choose from, by latency.")] = SHAPES,
    seeds: Annotated[int, typer.Option(help="Students of each goal.")] = SEEDS,
) -> None:
    """Goes the road once for each goal, in one folder, and saves the reports."""
    goals = [goal for goal in GOALS.get(task, ()) if speedup in (None, goal.speedup)]
    if task not in GOALS:
        raise typer.BadParameter(f"TASK is one of {', '.join(GOALS)}, not {task}")
    if not goals:
        raise typer.BadParameter(f"{task} has no goal of {speedup:g}x")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl"):
        shutil.copyfile(teacher / name, out / name)
    model = os.path.relpath((teacher / "variants" / task).resolve(), out.resolve())
    os.chdir(out)
    train = TrainOptions(batch=batch, learning_rate=learning_rate, precision=native_precision(device()))
    for budget in goals:
        one_goal(task, model, budget, minutes, train, shapes, seeds)


def one_goal(
    task: str, model: str, budget: Budget, minutes: float, train: TrainOptions, shapes: str, seeds: int
) -> None:
    """One run and its result."""
    name = f"students_{task.replace('-', '_')}_{budget.speedup:g}x"
    inputs = Inputs(
        model=model, train="train.jsonl", valid="valid.jsonl", test="test.jsonl", student=packaged_encoder(),
        command=f"python benchmarks/students.py {task} TEACHER_OUT OUT --speedup {budget.speedup:g} "
        f"--minutes {minutes:g} --batch {train.batch} --learning-rate {train.learning_rate:g} --shapes {shapes} "
        f"--seeds {seeds}",
    )  # fmt: skip
    options = OptimizeOptions(budget=budget, shapes=shapes, minutes=minutes, seeds=seeds, openvino=False)
    options = replace(options, distill=replace(options.distill, train=train))
    with Bars() as bars:
        report = optimize(inputs, Path("run"), options, bars)
    report = replace(report, model=task)
    judged = map(load_measurement, sorted(Path("run/measurements").glob("*.valid-distill.json")))
    (HERE / "results" / f"{name}.md").write_text(render(report, "markdown"), encoding="utf-8")
    save_result(name, {
        "minutes": minutes, "seeds": seeds, "batch": train.batch, "learning_rate": train.learning_rate,
        "precision": train.precision,
        "valid": {measurement.variant: asdict(measurement.quality.accuracy()) for measurement in judged},
        "report": msgspec.json.decode(render(report, "json")),
    })  # fmt: skip
    print(render(report, "terminal"))


if __name__ == "__main__":
    typer.run(main)
