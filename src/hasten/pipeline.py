"""The road, in order: import, export, quantize, distil; as far as the budget needs and no farther.

After each step the new variants are measured against the baseline on the validation split and judged. The first that
meets the budget ends the road; the test data are then used once, for the numbers of the report. Every result is kept
under a key of its inputs, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

from hasten import run_notes as notes
from hasten.answers import require_better_than_majority
from hasten.budget import Assessment, judge
from hasten.errors import MeasurementError
from hasten.intervals import Interval, points_lost
from hasten.measurement import Measurement, load_measurement, speedup, this_host
from hasten.openvino_runtime import has_bfloat16
from hasten.optimize_options import Observer, OptimizeOptions, Silent
from hasten.profiling import profile, run_key
from hasten.report import Report, RunInfo, compare
from hasten.report_render import save_report
from hasten.splits import Data, Inputs, read_data
from hasten.thread_plan import measure_plan, record_plan
from hasten.variant import Variant
from hasten.variant_maker import Maker, imported
from hasten.workload import Workload
from hasten.workshop import Workshop

log = logging.getLogger(__name__)
BASELINE = "torch-fp32"
CONTROL_MARK, FINISH_MARK = "-undistilled", "-rounded"
MOST_SENSITIVE = 5  # products that a report names
CONTROL = f"{CONTROL_MARK}-int8"


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
        self.stages: list[list[str]] = []
        self.valid: dict[str, Measurement] = {}
        self.share_of_baseline: dict[str, float] = {}  # of its median, in the validation run of each
        self.assessments: dict[str, Assessment] = {}

    def run(self) -> Report:
        """The whole road."""
        self.observer.stage("importing the model and reading the data")
        self.baseline = imported(self.inputs.model, self.shop, name=BASELINE)
        self.data = read_data(self.inputs, self.options, self.baseline.labels)
        self.make = Maker(self.baseline, self.data, self.options, self.shop, self.observer, student=self.inputs.student)
        self.make.check_student()
        self._write_run()
        for stage, build in (
            ("baseline", lambda: [self.baseline]),
            ("export", self._export),
            ("quantize", self._quantize),
            *([("simple", self._simple)] if self.options.simple else []),
            ("distill", self._students),
        ):
            self._judge(stage, build())
            if stage == "baseline" and not self.options.distill.force:
                quality = self.valid[BASELINE].quality
                require_better_than_majority(
                    quality, self.baseline.labels, who=self.inputs.model, rows="validation rows"
                )
            if self._is_enough() and not self.options.every_step:
                break
        return self._report(self._choose())

    def _export(self) -> list[Variant]:
        made = [self.make.exported(self.baseline, "onnx-fp32")]
        if self.options.with_openvino:
            made.append(self.make.exported_to_openvino(self.baseline, "openvino-fp32"))
        return made

    def _quantize(self) -> list[Variant]:
        source = self._candidate("onnx-fp32")
        made = [
            self.make.quantized(source, "onnx-int8"), self.make.quantized_dynamically(source, "onnx-int8-dynamic")
        ]  # fmt: skip
        if self.options.with_openvino:
            made += self._lowered_for_openvino(self._candidate("openvino-fp32"), "openvino")
        return made

    def _lowered_for_openvino(self, fp32: Variant, name: str) -> list[Variant]:
        """An OpenVINO variant in INT8, and both in bfloat16 where the CPU multiplies it."""
        int8 = self.make.quantized_for_openvino(fp32, f"{name}-int8")
        if not has_bfloat16():
            return [int8]
        both = ((fp32, f"{name}-bf16"), (int8, f"{name}-int8-bf16"))
        return [int8, *(self.make.converted_for_openvino(source, lowered) for source, lowered in both)]

    def _simple(self) -> list[Variant]:
        """Models without layers: on easy data they are enough, and everywhere they say what layers bring."""
        return [self.make.ngrams("tfidf"), self.make.static("static", self._teacher())]

    def _students(self) -> list[Variant]:
        """The student, the same from other seeds, and the same without the teacher."""
        if (found := self.make.student_start()) is None:
            return []
        start, shape = found
        teacher, name = self._teacher(), f"student-{shape}"
        made: list[Variant] = []
        for number in range(self.options.seeds):
            trained = self.make.trained(start, f"{name}{_seed(number)}-torch", teacher, number)
            exported = self.make.exported(trained, f"{name}{_seed(number)}-fp32")
            quantized = self.make.quantized(exported, f"{name}{_seed(number)}-int8")
            made += [quantized] if number else [exported, quantized]
            if not number and self.make.searches[quantized.name].lost_points.value > self.options.max_lost_points:
                made.append(self._finished(trained, quantized.name, teacher))
            if self.options.with_openvino and not number:
                other = self.make.exported_to_openvino(trained, f"{name}-openvino-fp32")
                made += [other, *self._lowered_for_openvino(other, f"{name}-openvino")]
        control = self.make.trained(start, f"{name}{CONTROL_MARK}-torch", None)
        exported = self.make.exported(control, f"{name}{CONTROL_MARK}-fp32")
        return [*made, self.make.quantized(exported, f"{name}{CONTROL_MARK}-int8")]

    def _finished(self, trained: Variant, quantized: str, teacher: Variant) -> Variant:
        """The student once more, where INT8 costs it too much: trained on with its products rounded."""
        name = quantized.replace("-int8", FINISH_MARK)
        finished = self.make.finished(trained, f"{name}-torch", teacher, quantized)
        return self.make.quantized(self.make.exported(finished, f"{name}-fp32"), f"{name}-int8")

    def _teacher(self) -> Variant:
        """Who answers for the students: fp32, or INT8 where that is faster and loses no more than allowed."""
        fp32, int8 = self._candidate("onnx-fp32"), self._candidate("onnx-int8")
        lost = self.make.searches[int8.name].lost_points.value
        sound = int8.manifest.batch_invariant and lost <= self.options.max_lost_points
        faster = self.share_of_baseline[int8.name] < self.share_of_baseline[fp32.name]  # each in a run of its own
        return int8 if sound and faster else fp32

    def _candidate(self, name: str) -> Variant:
        return next(variant for variant in self.candidates if variant.name == name)

    def _measure(self, variants: Sequence[Variant], workload: Workload, scenario: str) -> list[Measurement]:
        names = [variant.name for variant in variants]
        self.observer.stage(f"measuring {', '.join(names)} on {len(workload):,} {workload.name} rows, interleaved")
        options = self.options.profile
        if workload.name == "valid" and self.options.budget.p99_ms is None:  # a p99 takes as many here as at the end
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
        self.stages.append([variant.name for variant in variants])
        if not variants:
            return
        together = variants if stage == "baseline" else [self.baseline, *variants]
        measured = {m.variant: m for m in self._measure(together, self.data.valid, f"valid-{stage}")}
        self.valid |= {name: measured[name] for name in self.stages[-1]}
        whole_ms = _p50_ms(measured[BASELINE])
        self.share_of_baseline |= {name: _p50_ms(measured[name]) / whole_ms for name in self.stages[-1]}
        for variant in variants:
            self.assessments[variant.name] = judge(self.options.budget, measured[variant.name], measured[BASELINE])
            log.info("%s: %s", variant.name, "; ".join(self.assessments[variant.name].reasons))

    def _is_enough(self) -> bool:
        """Whether a later step could not help: the budget is met, or only more rows could decide the retention."""
        return any(a.verdict == "met" or (a.passes and a.latency_met) for a in self.assessments.values())

    def _choose(self) -> str | None:
        """The fastest of the first step that has a variant met on the validation split, else that passes by estimate.

        What is shown to lose more than allowed against its fp32 parent comes after all others, whatever the budget, and
        last the undistilled student: it shows what distillation brings, and is chosen if only it passes.
        """
        allowed = self.options.max_lost_points
        lossy = {name for name, lost in self._points_lost().items() if lost.is_above(allowed)}
        control = {name for name in self.assessments if name.endswith(CONTROL)}
        steps = [[name for name in stage if name not in lossy | control] for stage in self.stages]
        steps += [[name for name in self.assessments if name in last] for last in (lossy - control, control)]
        met = {name for name, assessment in self.assessments.items() if assessment.verdict == "met"}
        passing = {name for name, assessment in self.assessments.items() if assessment.passes}
        for wanted in (met, passing):
            for step in steps:
                if names := [name for name in step if name in wanted]:
                    return self._fastest(names)
        return None

    def _fastest(self, names: list[str]) -> str:
        """The first, unless a later one is shown to be faster and is no worse in company."""
        best = names[0]
        for name in names[1:]:
            faster = speedup(self.valid[best], self.valid[name]).lower
            invariant = self._candidate(name).manifest.batch_invariant
            if faster is not None and faster > 1 and invariant >= self._candidate(best).manifest.batch_invariant:
                best = name
        return best

    def _report(self, chosen: str | None) -> Report:
        measurements = self._measure(self.candidates, self.data.test, "test")
        run = RunInfo(
            budget=self.options.budget, baseline=BASELINE, chosen=chosen, command=self.inputs.command,
            model=self.inputs.model, rows=_rows(self.data), removed=self.data.removed,
            notes=self._notes(chosen, measurements), shapes=tuple(self.make.shapes),
            steps={v.name: self._facts(v) for v in self.candidates}, labels=tuple(self.baseline.labels),
            texts=self.data.test.texts,
        )  # fmt: skip
        self.shop.write_json(self.shop.out / "run-info.json", run)
        report = compare(measurements, run)
        save_report(report, self.shop.out)
        self.shop.choose(chosen)
        if chosen is not None:
            self._plan_threads(self._candidate(chosen))
        return report

    def _plan_threads(self, variant: Variant) -> None:
        """Measures how the server should share out the cores, unless a plan of such a machine stands there already."""
        plan, host = variant.manifest.plan, this_host()
        if variant.manifest.format != "torch" and (plan is None or not plan.is_of(host.cpu, host.cores)):
            self.observer.stage(f"measuring how {variant.name} shares out the cores")
            record_plan(variant, measure_plan(variant, self.data.valid.texts, self.observer.advance))

    def _facts(self, variant: Variant) -> dict[str, Any]:
        """What its step found out, and the search for it: in words, and whole."""
        if (search := self.make.searches.get(variant.name)) is None:
            return variant.manifest.step.facts
        tried = {f"tried {number}": str(way) for number, way in enumerate(search.candidates, 1)}
        worst = {"most sensitive products": list(search.sensitivity)[:MOST_SENSITIVE]} if search.sensitivity else {}
        whole = {"search": msgspec.to_builtins(search)}
        return variant.manifest.step.facts | {"quantization": str(search)} | tried | worst | whole

    def _points_lost(self) -> dict[str, Interval]:
        """What each variant of lower precision loses against its fp32 ancestor on the validation split, by name."""
        by_digest = {variant.digest: variant for variant in self.candidates}
        lost: dict[str, Interval] = {}
        for variant in self.candidates:
            parent: Variant | None = variant
            while parent is not None and parent.manifest.precision != "fp32":
                parent = by_digest.get(parent.manifest.step.parent or "")
            if parent is not None and parent is not variant:
                answers = [self.valid[which.name].quality.right for which in (variant, parent)]
                lost[variant.name] = points_lost(*answers)
        return lost

    def _notes(self, chosen: str | None, measurements: Sequence[Measurement]) -> tuple[str, ...]:
        idle = (
            *notes.absent_labels(self.data.train, self.baseline.labels),
            *notes.repeated_texts(self.data.test),
            *(["No student was made: the model is too small for one, no shape is smaller."] * (not self.stages[-1])),
            *notes.time_spent(self.make.training_plan),
            *notes.transfer_set(self.make.transfer_counts),
            *notes.spreads(measurements),
            *notes.does_not_pay(self.candidates, measurements),
            *notes.loses_too_much(self._points_lost(), self.options.max_lost_points),
        )
        if chosen is None:
            none = "No variant met the budget on the validation split, not even by its estimate; none is chosen."
            return (none, *idle)
        assessment = self.assessments[chosen]
        how = "met the budget" if assessment.verdict == "met" else "passed by its estimate (provisionally chosen)"
        return (f"On the validation split {chosen} {how}: {'; '.join(assessment.reasons)}.", *idle)

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


def _p50_ms(measurement: Measurement) -> float:
    return measurement.latency.percentile(50).value


def _seed(number: int) -> str:
    """The mark of a student from another seed than the first."""
    return f"{notes.SEED_MARK}{number}" if number else ""


def _rows(data: Data) -> dict[str, int]:
    return {name: len(getattr(data, name)) for name in ("train", "valid", "test")}


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
