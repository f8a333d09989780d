"""What each ingredient of distillation adds to a 3x384 student, in the same minutes.

    python benchmarks/ingredients.py TEACHER_OUT OUT [--minutes 8] [--texts 10000] [--seeds 1] [--arms 7]

TEACHER_OUT is what `teachers.py sst2-mpnet` made; students learn from a random part of its training texts. Every one
starts from the packaged 6x384 encoder, cut to three layers, and has the same minutes, by speeds measured once: for the
teacher's answers, for looking inside the teacher where it does, and for passes over the texts; the last ones have three
times as many, and may be left out. A row is the student in static INT8. The validation split is what a choice would be
made by; the test data are read once, at the end, and choose nothing. Interrupted and started again, it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import typer

from hasten import intervals
from hasten.checkpoint import import_checkpoint
from hasten.distillation import distill
from hasten.guidance import Guide, GuideOptions
from hasten.mixed_precision import native_precision, step_in
from hasten.onnx_export import export
from hasten.profiling import ProfileOptions
from hasten.progress import Bars
from hasten.quantization import QuantizeOptions, quantize
from hasten.runtime import open_runtime, predict_logits
from hasten.students import init_student, parse_shapes, shape_of, stand_for
from hasten.teaching import DistillOptions, Lesson, answers_at_once
from hasten.torch_runtime import load_torch_model
from hasten.torch_training import TrainingSet, TrainOptions, batches, device
from hasten.training_plan import (
    MOST_EPOCHS,
    RESERVE,
    SAMPLE_TEXTS,
    Speeds,
    TrainingPlan,
    measured_speeds,
    plan_training,
    seconds_a_text,
    typical_steps,
)
from hasten.transfer import TransferOptions, widened
from hasten.variant import Variant, open_variant
from hasten.workload import Workload, random_rows, read_workload
from hasten.workshop import Workshop, make_key
from provenance import HERE, save_result
from teachers import packaged_encoder

TASK, SHAPE = "sst2-mpnet", "3x384"
LEARNING_RATE, BATCH = 4e-4, 64
GUIDE_SHARE = 0.4  # of the minutes
CALIBRATION_TEXTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to teach.

    Attributes:
        name: What it is called.
        taught: Whether there is a teacher.
        guide: How the student looks inside the teacher first, if it does.
        epochs: Passes after which further minutes go into new texts; None makes none.
        times: How many times the minutes.
    """

    name: str
    taught: bool = True
    guide: GuideOptions | None = None
    epochs: float | None = None
    times: float = 1.0


ARMS = (
    Arm(name="labels alone", taught=False),
    Arm(name="answers"),
    Arm(name="answers, relations first", guide=GuideOptions(relation_weight=1.0, hidden_weight=0.0)),
    Arm(name="answers, hidden states first", guide=GuideOptions(relation_weight=0.0, hidden_weight=1.0)),
    Arm(name="answers, more texts", epochs=1.5),
    Arm(name="answers, three times as long", times=3.0),
    Arm(name="answers, more texts, three times as long", epochs=1.5, times=3.0),
)


class Study:
    """All arms of students of one shape, in one folder.

    Args:
        teacher: What `teachers.py` made.
        shop: Where variants are kept.
        minutes: For each student.
        bars: Is told what is done.
        texts: How many of the training texts students learn from.
        shape: The students', as `hasten students` names it.
        task: Name of the teacher's variant.
        learning_rate: Peak of the students' schedule.
    """

    def __init__(
        self, teacher: Path, shop: Workshop, minutes: float, bars: Bars, *, texts: int, shape: str = SHAPE,
        task: str = TASK, learning_rate: float = LEARNING_RATE,
    ) -> None:  # fmt: skip
        self.shop, self.minutes, self.bars, self.shape = shop, minutes, bars, shape
        self.threads = ProfileOptions().resolved_threads
        self.torch = open_variant(teacher / "variants" / task)
        everything, self.valid, self.test = (
            read_workload(str(teacher / f"{name}.jsonl"), name=name, labels=self.torch.labels)
            for name in ("train", "valid", "test")
        )
        self.train = everything.take(random_rows(len(everything), texts, seed=0))
        self.calibration = [self.train.texts[row] for row in random_rows(len(self.train), CALIBRATION_TEXTS, seed=0)]
        self.teacher = self.in_int8(self.torch, "teacher")
        self.source = self.variant("source", lambda out: import_checkpoint(
            packaged_encoder(), out, name="source", new_labels=self.torch.labels, seed=0
        ))  # fmt: skip
        parsed, start = parse_shapes(shape, shape_of(self.source))[0], f"{shape}-start"
        self.start = self.variant(
            start, lambda out: init_student(self.source, parsed, out, name=start), self.source.digest
        )
        train = TrainOptions(
            learning_rate=learning_rate, batch=BATCH, threads=self.threads, precision=native_precision(device())
        )  # fmt: skip
        self.base = DistillOptions(train=train)
        self.speeds, self.guided_s = self.measured()

    def variant(self, name: str, build: Callable[[Path], Variant], *key: Any) -> Variant:
        """A variant made once."""
        return self.shop.variant(name, make_key(name, *key), build)

    def in_int8(self, source: Variant, name: str) -> Variant:
        """A torch variant in static INT8, by way of fp32."""
        fp32 = self.variant(f"{name}-fp32", lambda out: export(source, out, name=f"{name}-fp32"), source.digest)
        return self.variant(
            f"{name}-int8",
            lambda out: quantize(fp32, out, QuantizeOptions(), name=f"{name}-int8", texts=self.calibration),
            fp32.digest,
            self.calibration,
        )

    def measured(self) -> tuple[Speeds, float]:
        """Seconds a text, for the teacher, a step, and a step that looks inside the teacher."""
        lesson = Lesson(data=self.train, teacher=self.teacher)
        key = make_key(self.start.digest, lesson.identity, self.base)
        speeds = self.shop.cached("speeds", key, Speeds, lambda: measured_speeds(self.start, lesson, self.base))
        return speeds, self.shop.cached("guided", key, float, self.guided_seconds)

    def guided_seconds(self) -> float:
        """Seconds a text of a step over relations."""
        rows = random_rows(len(self.train), SAMPLE_TEXTS, seed=0)
        texts = [self.train.texts[row] for row in rows]
        teacher, student = load_torch_model(self.torch), load_torch_model(self.start)
        ours, theirs = TrainingSet.of(self.start, student, texts), TrainingSet.of(self.torch, teacher, texts)
        guide = Guide(teacher, student, theirs, GuideOptions(), stand_for(self.torch, self.start))

        def step(some: Sequence[int]) -> None:
            inputs = ours.inputs(some)
            with step_in(self.base.train.precision, "cpu", inputs["input_ids"].shape[1]):
                value = guide.loss(inputs, some)
            value.backward()

        lengths = [len(e) for e in ours.encodings]
        found = seconds_a_text(step, typical_steps(batches(lengths, replace(self.base.train, epochs=1)), lengths))
        guide.end()
        return found

    def trained(self, arm: Arm, seed: int) -> tuple[Variant, dict[str, float]]:
        """A student of an arm, and how its minutes were spent."""
        minutes, options, rows = arm.times * self.minutes, self.base, len(self.train)
        seconds, transfer = 60 * minutes * (1 - RESERVE), tuple[str, ...]()
        if arm.epochs is not None:
            plan = plan_training(minutes, self.speeds, labelled=rows, wanted=arm.epochs)
            epochs, transfer = plan.epochs, self.transfer(plan)
        else:
            left_s = seconds - (rows * self.speeds.answer_s if arm.taught else 0)
            if arm.guide is not None:
                guided = GUIDE_SHARE * seconds / (rows * self.guided_s)
                options = replace(options, guide=replace(arm.guide, epochs=guided))
                left_s -= GUIDE_SHARE * seconds
            epochs = min(MOST_EPOCHS, left_s / (rows * self.speeds.train_s))
        options = replace(options, train=replace(options.train, epochs=epochs, seed=seed))
        lesson = Lesson(
            data=self.train, transfer=transfer, teacher=self.teacher if arm.taught else None, guide=self.torch,
            layers=stand_for(self.torch, self.start),
        )  # fmt: skip
        name = f"{self.shape}-{arm.name.replace(', ', '-').replace(' ', '-')}-{seed}"
        self.bars.stage(f"{name}: {epochs:.2f} passes over {rows + len(transfer):,} texts")
        made = self.variant(
            name,
            lambda out: distill(
                self.start, out, options, name=name, lesson=lesson, work=self.shop.work, progress=self.bars.advance
            ),
            self.start.digest, lesson.identity, options,
        )  # fmt: skip
        spent = {"passes": round(epochs, 2), "texts": rows + len(transfer), "guide_passes": options.guide.epochs}
        return made, spent

    def transfer(self, plan: TrainingPlan) -> tuple[str, ...]:
        """The new texts of a plan, for the teacher to answer."""
        options = TransferOptions(augment=plan.augment)
        key = make_key(self.torch.digest, self.train.digest, options)
        guarded = (*self.valid.texts, *self.test.texts)
        return self.shop.cached(
            "transfer", key, tuple[str, ...],
            lambda: widened(self.torch, self.train.texts, (), guarded, options).texts,
        )  # fmt: skip

    def right(self, variant: Variant, data: Workload) -> Any:
        """Which rows a variant answers rightly; shape [rows]."""
        runtime = open_runtime(variant, threads=self.threads)
        logits = predict_logits(runtime, data.texts, batch=answers_at_once(variant))
        return logits.argmax(-1) == np.array(data.labels)


def figures(right: Any, teacher: Any) -> dict[str, Any]:
    """An accuracy, and the share of the teacher's that it is, with intervals."""
    return {
        "accuracy": asdict(intervals.proportion(int(right.sum()), len(right))),
        "retained": asdict(intervals.paired_ratio(right, teacher)),
    }


def main(
    teacher: Path, out: Path, minutes: float = 8.0, texts: int = 10_000, seeds: int = 1, arms: int = len(ARMS),
    name: str = "ingredients",
) -> None:  # fmt: skip
    """Trains all students, judges them, saves."""
    shop, rows = Workshop(out), list[dict[str, Any]]()
    with shop.held(), Bars() as bars:
        study = Study(teacher, shop, minutes, bars, texts=texts)
        made = [(arm, seed, *study.trained(arm, seed)) for seed in range(seeds) for arm in ARMS[:arms]]
        served = [study.in_int8(variant, variant.name) for _, _, variant, _ in made]
        bars.stage("judging")
        base = {data.name: study.right(study.teacher, data) for data in (study.valid, study.test)}
        for (arm, seed, _, spent), variant in zip(made, served, strict=True):
            judged = {data.name: figures(study.right(variant, data), base[data.name])
                      for data in (study.valid, study.test)}  # fmt: skip
            rows.append({"arm": arm.name, "seed": seed, "minutes": arm.times * minutes, **spent, **judged})
    save_result(name, {
        "task": TASK, "shape": SHAPE, "minutes": minutes, "texts": texts, "seeds": seeds,
        "learning_rate": LEARNING_RATE, "batch": BATCH, "precision": study.base.train.precision,
        "texts_per_s": {"answers": 1 / study.speeds.answer_s, "training": 1 / study.speeds.train_s,
                        "guided": 1 / study.guided_s},
        "teacher": {name: figures(right, right)["accuracy"] for name, right in base.items()}, "rows": rows,
    })  # fmt: skip
    (HERE / "results" / f"{name}.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds."""
    lines = ["| | minutes | passes | texts | validation (%) | test (%) | retained on test (%) |"]
    lines += ["| :--- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        shown = {
            split: 100 * float(np.mean([row[split][what]["value"] for row in own]))
            for split, what in (("valid", "accuracy"), ("test", "accuracy"))
        }
        retained = 100 * float(np.mean([row["test"]["retained"]["value"] for row in own]))
        first = own[0]
        lines.append(
            f"| {arm} | {first['minutes']:g} | {first['passes']:g} | {first['texts']:,} | {shown['valid']:.2f} | "
            f"{shown['test']:.2f} | {retained:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
