"""Which of the variants on the road is chosen, and what is said beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_budget import a_measurement, latencies

from hasten import pipeline, run_notes
from hasten.budget import Assessment, Budget, Judgement, Verdict
from hasten.optimize_options import OptimizeOptions
from hasten.workload import Workload

STEPS = (["onnx-fp32"], ["onnx-int8", "onnx-int8-dynamic"], ["student-int8", "student-undistilled-int8"])
MEDIANS = {
    "onnx-fp32": 4.0, "onnx-int8": 2.0, "onnx-int8-dynamic": 1.0, "student-int8": 0.5, "student-undistilled-int8": 0.25
}  # fmt: skip


RIGHT, ROWS = 900, 1000


def chosen(
    invariant: Sequence[str] = tuple(MEDIANS), *, right: Mapping[str, int] | None = None, **verdicts: Verdict
) -> str | None:
    """What is chosen where the named ones, `_` for `-`, have a verdict, and all others missed.

    Those named in `right` have other numbers of rows right than all others.
    """
    return a_road(invariant, right or {}, verdicts)._choose()


def a_road(invariant: Sequence[str], right: Mapping[str, int], verdicts: Mapping[str, Verdict]) -> pipeline._Road:
    road = pipeline._Road(
        *cast("tuple[Any, Any, Any, Any]", (None, OptimizeOptions(budget=Budget(speedup=2)), None, None))
    )
    given = {name.replace("_", "-"): verdict for name, verdict in verdicts.items()}
    assert given.keys() <= MEDIANS.keys()
    for name, factor in MEDIANS.items():
        verdict = given.get(name, "missed")
        judgement = Judgement(criterion="p99_ms", verdict=verdict, passes=verdict != "missed", reason="")
        precision, parent = ("int8", "onnx-fp32") if name.startswith("onnx-int8") else ("fp32", None)
        step = SimpleNamespace(parent=parent)
        manifest = SimpleNamespace(batch_invariant=name in invariant, precision=precision, step=step)
        road.candidates.append(cast("Any", SimpleNamespace(name=name, digest=name, manifest=manifest)))
        road.assessments[name] = Assessment(judgements=(judgement,))
        road.valid[name] = a_measurement(name, samples_ms=latencies() * factor, right=right.get(name, RIGHT), rows=ROWS)
    road.stages = [list(step) for step in STEPS]
    return road


def test_the_first_step_that_meets_the_budget_is_enough() -> None:
    assert chosen(onnx_fp32="met", student_int8="met") == "onnx-fp32"
    assert chosen(onnx_fp32="undecided", student_int8="met") == "student-int8"


def test_within_a_step_the_faster_one_is_taken_unless_a_batch_would_change_its_answers() -> None:
    assert chosen(onnx_int8="met", onnx_int8_dynamic="met") == "onnx-int8-dynamic"
    assert chosen(("onnx-int8",), onnx_int8="met", onnx_int8_dynamic="met") == "onnx-int8"


def test_the_control_comes_last() -> None:
    assert chosen(student_int8="met", student_undistilled_int8="met") == "student-int8"
    assert chosen(student_int8="undecided", student_undistilled_int8="met") == "student-undistilled-int8"


def test_where_nothing_is_shown_the_estimate_decides() -> None:
    assert chosen(onnx_int8="undecided", student_int8="undecided") == "onnx-int8"
    assert chosen() is None


def test_what_is_shown_to_lose_more_than_allowed_comes_after_what_is_not() -> None:
    too_much, not_shown = RIGHT - 20, RIGHT - 4  # of 1000 rows; 0.3 points may be lost
    both: dict[str, Verdict] = {"onnx_int8": "met", "onnx_int8_dynamic": "met"}
    assert chosen(right={"onnx-int8-dynamic": not_shown}, **both) == "onnx-int8-dynamic"
    assert chosen(right={"onnx-int8-dynamic": too_much}, **both) == "onnx-int8"
    lossy = {"onnx-int8": too_much, "onnx-int8-dynamic": too_much}
    assert chosen(right=lossy, student_int8="met", **both) == "student-int8"
    assert chosen(right=lossy, student_int8="undecided", **both) == "onnx-int8-dynamic"
    assert chosen(right=lossy, student_undistilled_int8="met", **both) == "onnx-int8-dynamic"


def test_what_is_shown_to_lose_more_than_allowed_is_named() -> None:
    road = a_road((), {"onnx-int8": RIGHT - 20, "onnx-int8-dynamic": RIGHT - 4}, {})
    lost = road._points_lost()
    assert {name: round(points.value, 6) for name, points in lost.items()} == {
        "onnx-int8": 2.0, "onnx-int8-dynamic": 0.4
    }  # fmt: skip
    (sentence,) = run_notes.loses_too_much(lost, 0.3)
    assert sentence.startswith("onnx-int8 is shown to lose more than 0.3 points of accuracy on the validation split")
    assert "2.00, at least 1." in sentence


def test_what_a_reader_should_know_of_the_data_is_said() -> None:
    rows = Workload(name="test", source="", texts=("a", "b", " A "), labels=(0, 0, 0))
    (absent,) = run_notes.absent_labels(rows, ("yes", "no"))
    assert absent == "1 of 2 labels have no training row ('no'): a student can hardly learn them."
    (repeated,) = run_notes.repeated_texts(rows)
    assert repeated.startswith("1 of the 3 test rows repeat the text of another.")
    assert not [*run_notes.repeated_texts(rows.take([0, 1])), *run_notes.absent_labels(rows, ("yes",))]


@pytest.mark.parametrize(("bfloat16", "expected"), [(False, ["-int8"]), (True, ["-int8", "-bf16", "-int8-bf16"])])
def test_openvino_has_bfloat16_where_the_cpu_has(
    bfloat16: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "has_bfloat16", lambda: bfloat16)
    road = pipeline._Road(*cast("tuple[Any, Any, Any, Any]", (None,) * 4))

    def made(source: Any, name: str) -> Any:
        return SimpleNamespace(name=name, source=source.name)

    road.make = cast("Any", SimpleNamespace(quantized_for_openvino=made, converted_for_openvino=made))
    found = road._lowered_for_openvino(cast("Any", SimpleNamespace(name="fp32")), "openvino")
    assert [variant.name for variant in found] == [f"openvino{kind}" for kind in expected]
    assert [cast("Any", variant).source for variant in found] == ["fp32", "fp32", "openvino-int8"][: len(found)]


def test_a_precision_that_does_not_pay_is_named() -> None:
    rows = {"fp32": (None, 1.0), "int8": ("fp32", 0.5), "bf16": ("fp32", 1.0), "int8+bf16": ("int8", 0.6)}
    variants = [
        SimpleNamespace(
            name=name, digest=name, manifest=SimpleNamespace(precision=name, step=SimpleNamespace(parent=parent))
        )
        for name, (parent, _) in rows.items()
    ]  # fmt: skip
    measured = [a_measurement(name, samples_ms=latencies() * factor) for name, (_, factor) in rows.items()]
    same, slower = run_notes.does_not_pay(cast("Any", variants), measured)
    assert same.startswith("bfloat16 does not pay on this CPU for bf16: 1.00 times the speed of fp32")
    assert slower.startswith("bfloat16 does not pay on this CPU for int8+bf16: 0.83 times the speed of int8")
    factors = {"fp32": 0.5, "int8": 1.0}
    measured = [a_measurement(name, samples_ms=latencies() * factor) for name, factor in factors.items()]
    (idle,) = run_notes.does_not_pay(cast("Any", variants[:2]), measured)
    assert idle.startswith("INT8 does not pay on this CPU for int8: 0.50 times the speed of fp32")


@pytest.mark.parametrize("name", ["student-2x128-int8", "student-2x128-seed1-int8"])
def test_one_student_alone_has_no_spread(name: str) -> None:
    assert not list(run_notes.spreads([a_measurement(name)]))
