"""The road, in order: import, export, quantize, distil; as far as the budget needs and no farther.

After each step the new variants are measured against the baseline on the validation split and judged. The first that
meets the budget ends the road; the test data are then used once, for the numbers of the report. Every result is kept
under a key of its inputs, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec

from hasten.budget import Assessment, Budget, judge
from hasten.checkpoint import import_checkpoint
from hasten.distillation import DistillOptions, distill
from hasten.errors import MeasurementError
from hasten.files import file_sha256
from hasten.measurement import Measurement, load_measurement, this_host
from hasten.onnx_export import ExportOptions, export
from hasten.profiling import ProfileOptions, profile, run_key
from hasten.quantization import QuantizeOptions, quantize
from hasten.quantization_search import Choice, Question, choose_quantization
from hasten.report import Report, RunInfo, ShapeRow, compare
from hasten.report_render import save_report
from hasten.splits import Data, Inputs, read_data
from hasten.student_search import Search, latency_table
from hasten.students import Shape, candidate_shapes, init_student, parse_shapes, shape_of, student_shape
from hasten.variant import Variant
from hasten.workload import Workload, random_rows
from hasten.workshop import Workshop, make_key

log = logging.getLogger(__name__)
BASELINE = "torch-fp32"
PARITY_TEXTS = 500
QUANTIZE_TEXTS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizeOptions:
    """How to go down the road.

    Attributes:
        budget: What must be met.
        every_step: Go through all steps even when an early one meets the budget.
        strict: Treat a text that stands in two splits as an error instead of removing it from the training side.
        valid_share: Share of the training data to validate on, where no validation data are given.
        valid_rows: Most rows to validate on; above 0.
        valid_samples: Timed requests a variant on the validation split, at least; 299 are needed to judge a p99.
        shapes: Student shapes to consider, such as `2x128,3x384`; None takes a catalogue.
        seed: Seed of splits, orders and training.
        export: How to export.
        quantize: How to quantize; the calibration is searched for.
        max_lost_points: Points of accuracy that an INT8 variant may lose against its fp32 parent; if it is shown to
            lose more, products are put back to fp32.
        distill: How to distil.
        profile: How to measure.
    """

    budget: Budget
    every_step: bool = False
    strict: bool = False
    valid_share: float = 0.2
    valid_rows: int = 1000
    valid_samples: int = 300
    shapes: str | None = None
    seed: int = 0
    export: ExportOptions = field(default_factory=ExportOptions)
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    max_lost_points: float = 0.3
    distill: DistillOptions = field(default_factory=DistillOptions)
    profile: ProfileOptions = field(default_factory=ProfileOptions)


class Observer(Protocol):
    """Is told how far a run has come."""

    def stage(self, name: str) -> None:
        """A new stage begins."""
        ...

    def advance(self, done: int, total: int) -> None:
        """The current stage has come so far."""
        ...


class Silent:
    """An observer that says nothing."""

    def stage(self, name: str) -> None:
        """Ignores it."""

    def advance(self, done: int, total: int) -> None:
        """Ignores it."""


def optimize(inputs: Inputs, out: Path, options: OptimizeOptions, observer: Observer | None = None) -> Report:
    """Turns a fine-tuned classifier into the first variant on the road that meets a budget, with the evidence.

    Args:
        inputs: Model and data.
        out: The folder of the run; one that was interrupted is continued.
        options: The budget and how to go about it.
        observer: Is told how far the run has come.

    Returns:
        The report, as saved into `out`; its `verdict` is the chosen variant's on the test data.

    Raises:
        HastenError: Anything in `hasten.errors`: bad input, a step that is not faithful, a folder that is not writable.
    """
    workshop = Workshop(out)
    with workshop.held():
        return _Road(inputs, options, workshop, observer or Silent()).run()


class _Road:
    """One run, step by step."""

    def __init__(self, inputs: Inputs, options: OptimizeOptions, workshop: Workshop, observer: Observer) -> None:
        self.inputs, self.options, self.shop, self.observer = inputs, options, workshop, observer
        self.candidates: list[Variant] = []
        self.assessments: dict[str, Assessment] = {}
        self.shapes: list[ShapeRow] = []
        self.searches: dict[str, Choice] = {}

    def run(self) -> Report:
        """The whole road."""
        self.observer.stage("importing the model and reading the data")
        self.baseline = self._step(BASELINE, ["import", *_source_key(self.inputs.model)], self._import)
        self.data = read_data(self.inputs, self.options, self.baseline.labels)
        self._write_run()
        for stage, build in (
            ("baseline", lambda: [self.baseline]),
            ("export", self._export),
            ("quantize", self._quantize),
            ("distill", self._students),
        ):
            self._judge(stage, build())
            if self._is_enough() and not self.options.every_step:
                break
        return self._report(self._choose())

    def _step(self, name: str, key: list[Any], build: Callable[[Path], Variant]) -> Variant:
        return self.shop.variant(name, make_key(name, *key), build)

    def _import(self, out: Path) -> Variant:
        return import_checkpoint(self.inputs.model, out, name=BASELINE)

    def _export(self) -> list[Variant]:
        self.observer.stage("exporting to ONNX and proving parity")
        return [self._exported(self.baseline, "onnx-fp32")]

    def _exported(self, source: Variant, name: str) -> Variant:
        texts = self._some_texts(PARITY_TEXTS)
        options = self.options.export
        return self._step(
            name, [source.digest, options, texts], lambda out: export(source, out, options, name=name, texts=texts)
        )

    def _quantize(self) -> list[Variant]:
        source = self.candidates[-1]
        static = self._quantized(source, "onnx-int8", self._searched(source, "onnx-int8"))
        dynamic = replace(self.options.quantize, method="dynamic")
        return [static, self._quantized(source, "onnx-int8-dynamic", dynamic)]

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

    def _students(self) -> list[Variant]:
        start, shape = self._student_start()
        graph = next(variant for variant in self.candidates if variant.name == "onnx-fp32")
        made: list[Variant] = []
        for suffix, teacher in (("", graph), ("-undistilled", None)):
            name = f"student-{shape}{suffix}"
            self.observer.stage(f"distilling {name}" if teacher else f"training {name}, without the teacher")
            trained = self._trained(start, f"{name}-torch", teacher)
            self.observer.stage(f"exporting {name}")
            exported = self._exported(trained, f"{name}-fp32")
            quantized = self._quantized(exported, f"{name}-int8", self._searched(exported, f"{name}-int8"))
            made += [exported, quantized] if teacher else [quantized]
        return made

    def _student_start(self) -> tuple[Variant, Shape]:
        if self.inputs.student is not None:
            source = self.inputs.student
            labels = self.baseline.labels
            start = self._step(
                "student-start", ["import", *_source_key(source), labels, self.options.seed],
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

    def _trained(self, start: Variant, name: str, teacher: Variant | None) -> Variant:
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

    def _measure(self, variants: Sequence[Variant], workload: Workload, scenario: str) -> list[Measurement]:
        names = [variant.name for variant in variants]
        self.observer.stage(f"measuring {', '.join(names)} on {len(workload):,} {workload.name} rows, interleaved")
        options = self.options.profile
        if workload.name == "valid":
            options = replace(options, samples=min(options.samples, self.options.valid_samples))
        if workload.name == "valid" and len(variants) > 1:
            options = replace(options, breakdown_samples=0)
        key = run_key(variants, workload, options, scenario)
        return self.shop.measured(
            names, scenario, key,
            lambda: profile(variants, workload, options, scenario=scenario, progress=self.observer.advance),
        )  # fmt: skip

    def _judge(self, stage: str, variants: list[Variant]) -> None:
        """Measures new candidates against the baseline on the validation split and judges them."""
        self.candidates += variants
        together = variants if stage == "baseline" else [self.baseline, *variants]
        measured = {m.variant: m for m in self._measure(together, self.data.valid, f"valid-{stage}")}
        for variant in variants:
            self.assessments[variant.name] = judge(self.options.budget, measured[variant.name], measured[BASELINE])
            log.info("%s: %s", variant.name, "; ".join(self.assessments[variant.name].reasons))

    def _is_enough(self) -> bool:
        """Whether a later step could not help: the budget is met, or only more rows could decide the retention."""
        return any(a.verdict == "met" or (a.passes and a.latency_met) for a in self.assessments.values())

    def _choose(self) -> str | None:
        """The first variant on the road that is met on the validation split, else the first that passes by estimate.

        The undistilled student comes last: it shows what distillation brings, and is chosen if only it passes.
        """
        names = list(self.assessments)
        met = [name for name in names if self.assessments[name].verdict == "met"]
        passing = [name for name in names if self.assessments[name].passes]
        return next(iter(met + passing), None)

    def _report(self, chosen: str | None) -> Report:
        measurements = self._measure(self.candidates, self.data.test, "test")
        run = RunInfo(
            budget=self.options.budget, baseline=BASELINE, chosen=chosen, command=self.inputs.command,
            model=self.inputs.model, rows=_rows(self.data), removed=self.data.removed, notes=self._notes(chosen),
            shapes=tuple(self.shapes), steps={v.name: self._facts(v) for v in self.candidates},
        )  # fmt: skip
        self.shop.write_json(self.shop.out / "run-info.json", run)
        report = compare(measurements, run)
        save_report(report, self.shop.out)
        self.shop.choose(chosen)
        return report

    def _facts(self, variant: Variant) -> dict[str, Any]:
        search = self.searches.get(variant.name)
        return variant.manifest.step.facts | ({} if search is None else {"search": msgspec.to_builtins(search)})

    def _notes(self, chosen: str | None) -> tuple[str, ...]:
        if chosen is None:
            return ("No variant met the budget on the validation split, not even by its estimate; none is chosen.",)
        assessment = self.assessments[chosen]
        how = "met the budget" if assessment.verdict == "met" else "passed by its estimate (provisionally chosen)"
        return (f"On the validation split {chosen} {how}: {'; '.join(assessment.reasons)}.",)

    def _write_run(self) -> None:
        digests = {name: getattr(self.data, name).digest for name in ("train", "valid", "test")}
        run = {
            "inputs": asdict(self.inputs),
            "options": asdict(self.options),
            "data": digests,
            "rows": _rows(self.data),
        }
        more = {"model": self.baseline.digest, "host": this_host()}
        self.shop.write_json(self.shop.out / "run.json", run | more)


def _rows(data: Data) -> dict[str, int]:
    return {name: len(getattr(data, name)) for name in ("train", "valid", "test")}


def _source_key(source: str) -> list[str]:
    """Identity of a checkpoint: its files' hashes, or the hub id."""
    folder = Path(source)
    if not folder.is_dir():
        return [source]
    kinds = (".json", ".safetensors", ".txt", ".model")
    files = sorted(p for p in folder.iterdir() if p.suffix in kinds and p.name != "variant.json")
    return [hashlib.sha256("".join(f"{p.name} {file_sha256(p)}\n" for p in files).encode()).hexdigest()]


def report_again(out: Path) -> Report:
    """Makes a run's report from what it measured.

    Args:
        out: The folder of a finished run.

    Returns:
        The report, saved again.

    Raises:
        MeasurementError: The folder has no finished run, or its measurements are damaged.
    """
    path = out / "run-info.json"
    try:
        run = msgspec.json.decode(path.read_bytes(), type=RunInfo)
    except (OSError, msgspec.MsgspecError) as error:
        raise MeasurementError(f"{path}: no finished run to report on: {error}") from error
    names = list(run.steps)
    report = compare([load_measurement(out / "measurements" / f"{name}.test.json") for name in names], run)
    save_report(report, out)
    return report
