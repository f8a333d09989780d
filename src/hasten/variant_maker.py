"""Every variant of a run, made, or taken from disk where it was made from the same inputs.

`Maker` knows how each variant is made and under which key it is kept, and nothing of the order or of verdicts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.checkpoint import import_checkpoint
from hasten.distillation import distill
from hasten.files import file_sha256
from hasten.layer_choice import layer_influences, most_influential
from hasten.measurement import this_host
from hasten.ngram_model import NgramOptions, fit_ngrams
from hasten.onnx_export import export
from hasten.openvino_steps import convert_openvino, export_openvino, quantize_openvino
from hasten.optimize_options import Observer, OptimizeOptions
from hasten.quantization import QuantizeOptions, quantize
from hasten.quantization_search import Choice, Question, choose_quantization
from hasten.report import ShapeRow
from hasten.splits import Data
from hasten.static_student import StaticOptions, train_static
from hasten.student_search import Search, latency_table, shapes_to_measure
from hasten.students import Shape, init_student, shape_of, stand_for
from hasten.teaching import DistillOptions, Lesson, answered_texts
from hasten.torch_training import TrainOptions
from hasten.training_plan import TrainingPlan, measured_speeds, plan_training, refitted, wanted_epochs
from hasten.transfer import TransferOptions, TransferSet, guarding_seconds, widened
from hasten.variant import Variant
from hasten.workload import some_rows
from hasten.workshop import Workshop, make_key

PARITY_TEXTS = 500
QUANTIZE_TEXTS = 128
FINISH_EPOCHS, FINISH_RATE = 1.0, 0.25


def imported(source: str, shop: Workshop, *, name: str) -> Variant:
    """The user's checkpoint as a variant; its labels are what the data are read by."""
    return shop.variant(
        name, make_key(name, "import", *source_key(source)), lambda out: import_checkpoint(source, out, name=name)
    )


class Maker:
    """Makes the variants of one run; `shapes` and `searches` fill as it does.

    Args:
        baseline: The imported checkpoint.
        data: The splits.
        options: What the run is asked for.
        shop: Where variants are kept.
        observer: Is told what is being made.
        student: Folder or hub id of a small checkpoint that the student starts from, whole or cut to a shape; None cuts
            it from the baseline.

    Attributes:
        shapes: The table of student shapes, once it was measured.
        searches: What the searches for a quantization came to, by variant.
        training_plan: How the minutes are spent on the student, once they were planned.
        transfer_counts: How many texts of the transfer set came from where, once it was made.
    """

    def __init__(
        self, baseline: Variant, data: Data, options: OptimizeOptions, shop: Workshop, observer: Observer,
        *, student: str | None,
    ) -> None:  # fmt: skip
        self.baseline, self.data, self.options, self.shop, self.observer = baseline, data, options, shop, observer
        self.student_source = student
        self.shapes: list[ShapeRow] = []
        self.searches: dict[str, Choice] = {}
        self.transfer_counts: dict[str, int] = {}
        self.training_plan: TrainingPlan | None = None

    def _step(self, name: str, key: list[Any], build: Callable[[Path], Variant]) -> Variant:
        return self.shop.variant(name, make_key(name, *key), build)

    def exported(self, source: Variant, name: str) -> Variant:
        """A torch variant as a fused ONNX graph."""
        self.observer.stage(f"exporting {name} and proving parity")
        texts, options = self._some_texts(PARITY_TEXTS), self.options.export
        return self._step(
            name, [source.digest, options, texts], lambda out: export(source, out, options, name=name, texts=texts)
        )

    def exported_to_openvino(self, source: Variant, name: str) -> Variant:
        """A torch variant as an OpenVINO model."""
        self.observer.stage(f"exporting {name} and proving parity")
        texts = self._some_texts(PARITY_TEXTS)
        return self._step(
            name, [source.digest, texts], lambda out: export_openvino(source, out, name=name, texts=texts)
        )

    def quantized(self, source: Variant, name: str) -> Variant:
        """A fp32 ONNX variant in static INT8, in the way that the validation data speak for."""
        return self._quantized(source, name, self._searched(source, name))

    def quantized_dynamically(self, source: Variant, name: str) -> Variant:
        """A fp32 ONNX variant in dynamic INT8."""
        return self._quantized(source, name, replace(self.options.quantize, method="dynamic"))

    def quantized_for_openvino(self, source: Variant, name: str) -> Variant:
        """A fp32 OpenVINO variant in INT8."""
        self.observer.stage(f"quantizing {name}")
        return self._lowered_for_openvino(source, name, quantize_openvino)

    def converted_for_openvino(self, source: Variant, name: str) -> Variant:
        """An OpenVINO variant in bfloat16."""
        self.observer.stage(f"converting {name}")
        return self._lowered_for_openvino(source, name, convert_openvino)

    def _lowered_for_openvino(self, source: Variant, name: str, step: Callable[..., Variant]) -> Variant:
        texts, mixed = self._some_texts(QUANTIZE_TEXTS), self.data.valid.texts
        return self._step(
            name, [source.digest, texts, mixed], lambda out: step(source, out, name=name, texts=texts, mixed=mixed)
        )

    def check_student(self) -> None:
        """Refuses a student that could not be made, before anything else is.

        Raises:
            HastenError: Its checkpoint cannot be read, or the model cannot be cut to a shape that was asked for.
        """
        if self.student_source is not None or self.options.shapes is not None:
            shapes_to_measure(self._student_source(), self.options.shapes)

    def student_start(self) -> tuple[Variant, Shape] | None:
        """What the student starts from, untrained: the baseline or a given checkpoint, cut to a measured shape.

        None where no shape is smaller than the baseline.
        """
        source = self._student_source()
        if self.student_source is not None and self.options.shapes is None:
            return source, shape_of(source)
        self.observer.stage("measuring student shapes before training")
        shapes = shapes_to_measure(source, self.options.shapes)
        if not shapes:
            return None
        search = Search(
            baseline=self.baseline, source=source, texts=self.data.valid.texts, budget=self.options.budget,
            options=self.options.profile,
        )  # fmt: skip
        self.shapes = latency_table(search, shapes, self.shop)
        best = next(row for row in self.shapes if row.chosen)
        shape = next(shape for shape in shapes if str(shape) == best.name)
        name, layers = f"student-{shape}-start", self._layers(source, shape)
        start = self._step(
            name, [source.digest, shape, layers, self.options.seed],
            lambda out: init_student(source, shape, out, name=name, layers=layers, seed=self.options.seed),
        )  # fmt: skip
        return start, shape

    def _layers(self, source: Variant, shape: Shape) -> list[int] | None:
        """Which layers the student starts from, if they are not evenly spaced."""
        if self.options.layers == "spaced":
            return None
        return most_influential(layer_influences(source, self._some_texts(QUANTIZE_TEXTS)), shape.layers)

    def _student_source(self) -> Variant:
        """What the student is cut from."""
        if (source := self.student_source) is None:
            return self.baseline
        labels, seed = self.baseline.labels, self.options.seed
        return self._step(
            "student-source", ["import", *source_key(source), labels, seed],
            lambda out: import_checkpoint(source, out, name="student-source", new_labels=labels, seed=seed),
        )  # fmt: skip

    def trained(self, start: Variant, name: str, teacher: Variant | None, number: int = 0) -> Variant:
        """A student from the given number's seed, trained on the teacher's logits and the labels, or these alone."""
        train, transfer = self._seeded(self.options.distill.train, number), self.options.transfer
        plan = None if teacher is None else self._plan(start, teacher)
        if plan is not None:
            transfer = replace(transfer, augment=plan.augment)
        lesson = self._lesson(start, teacher, transfer)
        if plan is not None:
            self.training_plan = refitted(plan, len(lesson.texts))
            train = replace(train, epochs=self.training_plan.epochs)
        elif (plan := self.training_plan) is not None:  # the control gets no more time than the student
            most = plan.predicted_s / (len(self.data.train) * plan.speeds.train_s)
            train = replace(train, epochs=min(train.epochs, most))
        self.observer.stage(f"distilling {name}" if teacher else f"training {name}, without the teacher")
        return self._taught(start, name, lesson, replace(self.options.distill, train=train))

    def finished(self, trained: Variant, name: str, teacher: Variant, quantized: str) -> Variant:
        """A trained student, trained on for a little with its products rounded as those of its INT8 form."""
        self.observer.stage(f"distilling {name} with its products rounded")
        plain, plan = self.options.distill, self.training_plan
        transfer = self.options.transfer if plan is None else replace(self.options.transfer, augment=plan.augment)
        rate = plain.train.learning_rate * FINISH_RATE
        options = replace(
            plain, guide=replace(plain.guide, epochs=0.0),
            rounding_bits=7 if self.searches[quantized].options.reduces_range else 8,
            train=replace(self._seeded(plain.train), epochs=FINISH_EPOCHS, learning_rate=rate, precision="fp32"),
        )  # fmt: skip
        return self._taught(trained, name, self._lesson(trained, teacher, transfer), options)

    def _taught(self, start: Variant, name: str, lesson: Lesson, options: DistillOptions) -> Variant:
        return self._step(
            name, [start.digest, *lesson.identity, options],
            lambda out: distill(start, out, options, name=name, lesson=lesson, work=self.shop.work,
                                progress=self.observer.advance),
        )  # fmt: skip

    def ngrams(self, name: str) -> Variant:
        """TF-IDF with logistic regression."""
        self.observer.stage(f"fitting {name}")
        data, valid = self.data.train, self.data.valid
        return self._step(
            name, [self.baseline.digest, data.digest, valid.digest, NgramOptions()],
            lambda out: fit_ngrams(self.baseline, out, name=name, data=data, valid=valid),
        )  # fmt: skip

    def static(self, name: str, teacher: Variant) -> Variant:
        """A student without layers, trained on the teacher's logits and the labels."""
        lesson, distillation = self._lesson(self.baseline, teacher, self.options.transfer), self.options.distill
        self.observer.stage(f"distilling {name}")
        options = replace(StaticOptions(), train=self._seeded(StaticOptions().train))
        return self._step(
            name, [self.baseline.digest, *lesson.identity, options, distillation],
            lambda out: train_static(
                self.baseline, out, options, name=name, lesson=lesson, distillation=distillation, work=self.shop.work,
                progress=self.observer.advance,
            ),
        )  # fmt: skip

    def _seeded(self, train: TrainOptions, number: int = 0) -> TrainOptions:
        return replace(train, seed=self.options.seed + number, threads=self.options.profile.resolved_threads)

    def _plan(self, start: Variant, teacher: Variant) -> TrainingPlan | None:
        """How the minutes are spent, if there is a number of them; what was planned once stays, and so do results."""
        if self.options.minutes is None:
            return None
        self.observer.stage("planning the minutes")
        options = replace(self.options.distill, train=self._seeded(self.options.distill.train))
        more = self.data.unlabelled
        lesson = Lesson(data=self.data.train, transfer=more, teacher=teacher)
        guarded, machine = (self._guarded(), self.options.transfer.nearly_equal), (this_host().cpu, this_host().cores)
        key = make_key(start.digest, *lesson.identity, options, self.options.minutes, guarded, machine)

        def plan() -> TrainingPlan:
            speeds = measured_speeds(start, lesson, options)
            new_s = guarding_seconds(lesson.texts, self._guarded(), self.options.transfer.nearly_equal)
            return plan_training(
                self.options.minutes or 0, replace(speeds, new_s=new_s), labelled=len(self.data.train),
                wanted=wanted_epochs(len(self.data.train), len(start.labels)), unlabelled=len(more),
                answered=answered_texts(teacher, lesson.texts, self.shop.work),
            )  # fmt: skip

        self.training_plan = self.shop.cached("plan", key, TrainingPlan, plan)
        self.observer.stage(str(self.training_plan))
        return self.training_plan

    def _lesson(self, start: Variant, teacher: Variant | None, wanted: TransferOptions) -> Lesson:
        if teacher is None:
            return Lesson(data=self.data.train, teacher=None, watched=self.data.valid)
        return Lesson(
            data=self.data.train, transfer=self._transfer_set(wanted).texts, teacher=teacher, guide=self.baseline,
            layers=stand_for(self.baseline, start), watched=self.data.valid,
        )  # fmt: skip

    def _transfer_set(self, wanted: TransferOptions) -> TransferSet:
        """Texts without labels for the teacher to answer."""
        options = replace(wanted, seed=self.options.seed)
        if not (options.augment or self.data.unlabelled):
            self.transfer_counts = {}
            return TransferSet()
        self.observer.stage("widening the training texts")
        train, guarded = self.data.train.texts, self._guarded()
        key = make_key(self.baseline.digest, train, guarded, self.data.unlabelled, options)
        found: TransferSet = self.shop.cached(
            "transfer", key, TransferSet,
            lambda: widened(self.baseline, train, self.data.unlabelled, guarded, options),
        )  # fmt: skip
        self.transfer_counts = found.counts
        return found

    def _guarded(self) -> tuple[str, ...]:
        """Texts that no new text may come near."""
        return (*self.data.valid.texts, *self.data.test.texts)

    def _searched(self, source: Variant, name: str) -> QuantizeOptions:
        """The way to quantize that the validation data speak for."""
        self.observer.stage(f"looking for the best calibration of {name}")
        question = Question(
            source=source, texts=self._some_texts(QUANTIZE_TEXTS), valid=self.data.valid, options=self.options.quantize,
            max_lost_points=self.options.max_lost_points, threads=self.options.profile.resolved_threads,
        )  # fmt: skip
        parts = (question.texts, self.data.valid.digest, question.options, question.max_lost_points)
        key = make_key(source.digest, *parts, this_host().instructions)
        choice: Choice = self.shop.cached(
            f"quantization-{name}",
            key,
            Choice,
            lambda: choose_quantization(question, self.shop.work, self.observer.advance),
        )
        self.searches[name] = choice
        return choice.options

    def _quantized(self, source: Variant, name: str, options: QuantizeOptions) -> Variant:
        self.observer.stage(f"quantizing {name}")
        texts, mixed = self._some_texts(QUANTIZE_TEXTS), self.data.valid.texts
        return self._step(
            name, [source.digest, options, options.reduces_range, texts, mixed],
            lambda out: quantize(source, out, options, name=name, texts=texts, mixed=mixed),
        )  # fmt: skip

    def _some_texts(self, size: int) -> list[str]:
        """Training texts, the same at every call."""
        train = self.data.train
        rows = some_rows(len(train), size, seed=self.options.seed)
        return [train.texts[row] for row in rows]


def source_key(source: str) -> list[str]:
    """Identity of a checkpoint: its files' hashes, or the hub id."""
    folder = Path(source)
    if not folder.is_dir():
        return [source]
    kinds = (".json", ".safetensors", ".txt", ".model")
    files = sorted(p for p in folder.iterdir() if p.suffix in kinds and p.name != "variant.json")
    return [hashlib.sha256("".join(f"{p.name} {file_sha256(p)}\n" for p in files).encode()).hexdigest()]
