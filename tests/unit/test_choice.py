"""Which of the variants on the road is chosen, and what is said beside it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_budget import a_measurement, latencies

from hasten import pipeline
from hasten.budget import Assessment, Judgement, Verdict
from hasten.workload import Workload

STEPS = (["onnx-fp32"], ["onnx-int8", "onnx-int8-dynamic"], ["student-int8", "student-undistilled-int8"])
MEDIANS = {
    "onnx-fp32": 4.0, "onnx-int8": 2.0, "onnx-int8-dynamic": 1.0, "student-int8": 0.5, "student-undistilled-int8": 0.25
}  # fmt: skip


def chosen(invariant: Sequence[str] = tuple(MEDIANS), **verdicts: Verdict) -> str | None:
    """What is chosen where the named ones, `_` for `-`, have a verdict, and all others missed."""
    road = pipeline._Road(*cast("tuple[Any, Any, Any, Any]", (None,) * 4))
    given = {name.replace("_", "-"): verdict for name, verdict in verdicts.items()}
    assert given.keys() <= MEDIANS.keys()
    for name, factor in MEDIANS.items():
        verdict = given.get(name, "missed")
        judgement = Judgement(criterion="p99_ms", verdict=verdict, passes=verdict != "missed", reason="")
        manifest = SimpleNamespace(batch_invariant=name in invariant)
        road.candidates.append(cast("Any", SimpleNamespace(name=name, manifest=manifest)))
        road.assessments[name] = Assessment(judgements=(judgement,))
        road.valid[name] = a_measurement(name, samples_ms=latencies() * factor, right=900, rows=1000)
    road.stages = [list(step) for step in STEPS]
    return road._choose()


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


def test_what_a_reader_should_know_of_the_data_is_said() -> None:
    rows = Workload(name="test", source="", texts=("a", "b", " A "), labels=(0, 0, 0))
    (absent,) = pipeline._absent(rows, ("yes", "no"))
    assert absent == "1 of 2 labels have no training row ('no'): a student can hardly learn them."
    (repeated,) = pipeline._repeated(rows)
    assert repeated.startswith("1 of the 3 test rows repeat the text of another.")
    assert not [*pipeline._repeated(rows.take([0, 1])), *pipeline._absent(rows, ("yes",))]


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
    same, slower = pipeline._idle(cast("Any", variants), measured)
    assert same.startswith("bfloat16 does not pay on this CPU for bf16: 1.00 times the speed of fp32")
    assert slower.startswith("bfloat16 does not pay on this CPU for int8+bf16: 0.83 times the speed of int8")
    factors = {"fp32": 0.5, "int8": 1.0}
    measured = [a_measurement(name, samples_ms=latencies() * factor) for name, factor in factors.items()]
    (idle,) = pipeline._idle(cast("Any", variants[:2]), measured)
    assert idle.startswith("INT8 does not pay on this CPU for int8: 0.50 times the speed of fp32")


@pytest.mark.parametrize("name", ["student-2x128-int8", "student-2x128-seed1-int8"])
def test_one_student_alone_has_no_spread(name: str) -> None:
    assert not list(pipeline._spreads([a_measurement(name)]))
