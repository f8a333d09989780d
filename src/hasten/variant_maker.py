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
from hasten.onnx_export import export
from hasten.openvino_steps import export_openvino, quantize_openvino
from hasten.optimize_options import Observer, OptimizeOptions
from hasten.quantization import QuantizeOptions, quantize
from hasten.quantization_search import Choice, Question, choose_quantization
from hasten.report import ShapeRow
from hasten.splits import Data
from hasten.student_search import Search, latency_table
from hasten.students import Shape, candidate_shapes, init_student, parse_shapes, shape_of, student_shape
from hasten.variant import Variant
from hasten.workload import random_rows
from hasten.workshop import Workshop, make_key

PARITY_TEXTS = 500
QUANTIZE_TEXTS = 128


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
        student: Folder or hub id of a small checkpoint to start the student from; None cuts it from the baseline.

    Attributes:
        shapes: The table of student shapes, once it was measured.
        searches: What the searches for a quantization came to, by variant.
    """

    def __init__(
        self, baseline: Variant, data: Data, options: OptimizeOptions, shop: Workshop, observer: Observer,
        *, student: str | None,
    ) -> None:  # fmt: skip
        self.baseline, self.data, self.options, self.shop, self.observer = baseline, data, options, shop, observer
        self.student_source = student
        self.shapes: list[ShapeRow] = []
        self.searches: dict[str, Choice] = {}

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
        texts = self._some_texts(QUANTIZE_TEXTS)
        return self._step(
            name, [source.digest, texts], lambda out: quantize_openvino(source, out, name=name, texts=texts)
        )

    def student_start(self) -> tuple[Variant, Shape]:
        """What the student starts from, untrained: the given checkpoint, or the teacher cut to a measured shape."""
        if self.student_source is not None:
            source = self.student_source
            labels = self.baseline.labels
            start = self._step(
                "student-start", ["import", *source_key(source), labels, self.options.seed],
                lambda out: import_checkpoint(
                    source, out, name="student-start", new_labels=labels, seed=self.options.seed
                ),
            )  # fmt: skip
            return start, shape_of(start)
        self.observer.stage("measuring student shapes before training")
        teacher = shape_of(self.baseline)
        text = self.options.shapes
        shapes = candidate_shapes(teacher) if text is None else parse_shapes(text, teacher)
        search = Search(
            teacher=self.baseline, workload=self.data.valid, budget=self.options.budget, options=self.options.profile
        )
        self.shapes = latency_table(search, shapes, self.shop)
        best = next(row for row in self.shapes if row.chosen)
        shape = student_shape(teacher, best.layers, best.hidden)
        name = f"student-{shape}-start"
        start = self._step(
            name, [self.baseline.digest, shape, self.options.seed],
            lambda out: init_student(self.baseline, shape, out, name=name, seed=self.options.seed),
        )  # fmt: skip
        return start, shape

    def trained(self, start: Variant, name: str, teacher: Variant | None) -> Variant:
        """A student, trained on the teacher's logits and the labels, or on the labels alone."""
        self.observer.stage(f"distilling {name}" if teacher else f"training {name}, without the teacher")
        train = replace(
            self.options.distill.train, seed=self.options.seed, threads=self.options.profile.resolved_threads
        )
        options = replace(self.options.distill, train=train)
        key = [start.digest, teacher.digest if teacher else None, self.data.train.digest, options]
        return self._step(
            name, key,
            lambda out: distill(start, out, options, name=name, data=self.data.train, teacher=teacher,
                                work=self.shop.work, progress=self.observer.advance),
        )  # fmt: skip

    def _searched(self, source: Variant, name: str) -> QuantizeOptions:
        """The way to quantize that the validation data speak for."""
        self.observer.stage(f"looking for the best calibration of {name}")
        question = Question(
            source=source, texts=self._some_texts(QUANTIZE_TEXTS), valid=self.data.valid, options=self.options.quantize,
            max_lost_points=self.options.max_lost_points, threads=self.options.profile.resolved_threads,
        )  # fmt: skip
        parts = (question.texts, self.data.valid.digest, question.options, question.max_lost_points)
        key = make_key(source.digest, *parts)
        choice: Choice = self.shop.cached(
            f"quantization-{name}", key, Choice, lambda: choose_quantization(question, self.observer.advance)
        )
        self.searches[name] = choice
        return choice.options

    def _quantized(self, source: Variant, name: str, options: QuantizeOptions) -> Variant:
        self.observer.stage(f"quantizing {name}")
        texts = self._some_texts(QUANTIZE_TEXTS)
        return self._step(
            name, [source.digest, options, texts], lambda out: quantize(source, out, options, name=name, texts=texts)
        )

    def _some_texts(self, size: int) -> list[str]:
        """Training texts, the same at every call."""
        train = self.data.train
        rows = random_rows(len(train), min(size, len(train)), seed=self.options.seed)
        return [train.texts[row] for row in rows]


def source_key(source: str) -> list[str]:
    """Identity of a checkpoint: its files' hashes, or the hub id."""
    folder = Path(source)
    if not folder.is_dir():
        return [source]
    kinds = (".json", ".safetensors", ".txt", ".model")
    files = sorted(p for p in folder.iterdir() if p.suffix in kinds and p.name != "variant.json")
    return [hashlib.sha256("".join(f"{p.name} {file_sha256(p)}\n" for p in files).encode()).hexdigest()]
