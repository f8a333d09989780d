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


@pytest.mark.parametrize("name", ["student-2x128-int8", "student-2x128-seed1-int8"])
def test_one_student_alone_has_no_spread(name: str) -> None:
    assert not list(pipeline._spreads([a_measurement(name)]))
