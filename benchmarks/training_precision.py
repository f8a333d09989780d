"""What bfloat16 products bring to training on this CPU: texts a second, and what a student loses.

    python benchmarks/training_precision.py TEACHER_OUT OUT [--texts 10000] [--epochs 4] [--seeds 2]

TEACHER_OUT is what `teachers.py sst2-mpnet` made. Speeds are those of whole training steps over texts of all lengths,
the formats in turn. Then 3x384 students are trained in each format on the same answers, alike otherwise, and judged on
the validation split.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import torch
import typer

from hasten import intervals
from hasten.distillation import distill
from hasten.mixed_precision import Precision, step_in
from hasten.progress import Bars
from hasten.students import init_student, parse_shapes, shape_of
from hasten.teaching import Lesson
from hasten.torch_runtime import load_torch_model
from hasten.torch_training import TrainingSet, TrainOptions, batches
from hasten.training_plan import SAMPLE_TEXTS, typical_steps
from hasten.variant import Variant
from hasten.workshop import Workshop
from ingredients import Study
from provenance import save_result

FORMATS: tuple[Precision, ...] = get_args(Precision)
SHAPES = ("2x128", "3x384", "6x384")
ROUNDS = 3


def texts_per_s(start: Variant, texts: Sequence[str], options: TrainOptions) -> dict[str, float]:
    """Median over rounds for each format; a round are some steps that stand for all."""
    torch.set_num_threads(options.threads)
    model, rates = load_torch_model(start), {precision: list[float]() for precision in FORMATS}
    data = TrainingSet.of(start, model, texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    lengths = [len(e) for e in data.encodings]
    steps = typical_steps(batches(lengths, replace(options, epochs=1)), lengths)
    for _ in range(ROUNDS + 1):
        for precision in FORMATS:
            began = time.perf_counter()
            for rows in steps:
                optimizer.zero_grad()
                inputs = data.inputs(rows)
                with step_in(precision, "cpu", inputs["input_ids"].shape[1]):
                    value = model(**inputs).logits.float().square().mean()
                value.backward()
                optimizer.step()
            rates[precision].append(sum(map(len, steps)) / (time.perf_counter() - began))
    return {precision: round(statistics.median(found[1:]), 1) for precision, found in rates.items()}  # one warms up


def main(teacher: Path, out: Path, texts: int = 10_000, epochs: float = 4.0, seeds: int = 2) -> None:
    """Times, trains, judges, saves."""
    shop = Workshop(out)
    with shop.held(), Bars() as bars:
        study = Study(teacher, shop, 1.0, bars, texts=texts)
        sample, source = study.train.texts[:SAMPLE_TEXTS], study.source
        starts = {
            shape: study.variant(f"{shape}-timed", lambda folder, shape=shape: init_student(
                source, parse_shapes(shape, shape_of(source))[0], folder, name=shape
            ), source.digest)
            for shape in SHAPES
        }  # fmt: skip
        bars.stage("timing steps")
        speeds = {name: texts_per_s(start, sample, study.base.train) for name, start in starts.items()}
        rows, lesson = [], Lesson(data=study.train, teacher=study.teacher)
        for seed in range(seeds):
            for precision in FORMATS:
                name = f"{precision}-{seed}"
                options = replace(study.base, train=replace(
                    study.base.train, epochs=epochs, seed=seed, precision=precision
                ))  # fmt: skip
                bars.stage(f"training 3x384 in {precision}, seed {seed}")
                made = study.variant(name, lambda folder, name=name, options=options: distill(
                    study.start, folder, options, name=name, lesson=lesson, work=shop.work, progress=bars.advance
                ), study.start.digest, lesson.identity, options)  # fmt: skip
                found = study.right(study.in_int8(made, name), study.valid)
                rows.append({"precision": precision, "seed": seed,
                             "accuracy": asdict(intervals.proportion(int(found.sum()), len(found)))})  # fmt: skip
    save_result("training_precision", {"texts": texts, "epochs": epochs, "texts_per_s": speeds, "rows": rows})
    print(speeds, *rows, sep="\n")


if __name__ == "__main__":
    typer.run(main)
