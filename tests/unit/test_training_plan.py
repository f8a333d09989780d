"""A number of minutes becomes passes and texts: it always fits, spends what there is, and says what it will do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import LABELS, labelled_rows
from hasten import training_plan
from hasten.checkpoint import import_checkpoint
from hasten.errors import UsageError
from hasten.teaching import DistillOptions, Lesson
from hasten.torch_training import TrainOptions, batches
from hasten.training_plan import (
    LEAST_EPOCHS,
    MOST_EPOCHS,
    MOST_NEW_TEXTS,
    TIMED_STEPS,
    Speeds,
    measured_speeds,
    plan_training,
    refitted,
    typical_steps,
    wanted_epochs,
)
from hasten.workload import Workload

COSTS = st.floats(1e-4, 1.0)


@given(st.floats(0.1, 1000), COSTS, COSTS, st.integers(1, 100_000), st.integers(0, 100_000))
@settings(max_examples=200)
def test_a_plan_fits_and_spends_what_there_is(
    minutes: float, answer_s: float, train_s: float, labelled: int, unlabelled: int
) -> None:
    speeds = Speeds(answer_s=answer_s, train_s=train_s)
    if (labelled + unlabelled) * (answer_s + LEAST_EPOCHS * train_s) > 60 * minutes * 0.95:
        with pytest.raises(UsageError, match="too few"):
            plan_training(minutes, speeds, labelled=labelled, unlabelled=unlabelled, wanted=4)
        return
    plan = plan_training(minutes, speeds, labelled=labelled, unlabelled=unlabelled, wanted=4)
    assert plan.predicted_s <= 60 * minutes
    assert 0 <= plan.augment <= MOST_NEW_TEXTS
    assert plan.epochs <= MOST_EPOCHS
    if plan.augment > 0:
        assert plan.epochs >= 4 - 1e-6
    full = plan.epochs == MOST_EPOCHS
    assert full or plan.predicted_s == pytest.approx(60 * minutes * 0.95, rel=1e-6)


@given(st.floats(1, 100), COSTS, COSTS, st.integers(10, 1000))
@settings(max_examples=100)
def test_more_minutes_never_plan_less(minutes: float, answer_s: float, train_s: float, labelled: int) -> None:
    speeds = Speeds(answer_s=answer_s, train_s=train_s)
    assume(labelled * (answer_s + 0.3 * train_s) < 50 * minutes)
    less, more = (plan_training(m, speeds, labelled=labelled, wanted=4) for m in (minutes, 2 * minutes))
    assert more.augment >= less.augment
    assert more.predicted_s >= less.predicted_s


@given(COSTS, COSTS, st.integers(10, 1000), st.integers(0, 1000))
@settings(max_examples=100)
def test_what_the_teacher_has_answered_is_time_to_teach(
    answer_s: float, train_s: float, labelled: int, answered: int
) -> None:
    assume(answered <= labelled)
    speeds, minutes = Speeds(answer_s=answer_s, train_s=train_s), 60.0
    plan = plan_training(minutes, speeds, labelled=labelled, wanted=4, answered=answered)
    longer = minutes + answered * answer_s / 60 / 0.95
    same = plan_training(longer, speeds, labelled=labelled, wanted=4)
    assert (plan.epochs, plan.augment) == pytest.approx((same.epochs, same.augment), rel=1e-6, abs=2 / labelled)
    assert plan.predicted_s <= 60 * minutes
    assert f"answers {labelled - answered:,} texts" in str(plan)


@pytest.mark.parametrize(
    ("labelled", "classes", "passes"), [(40_000, 2, 1.5), (14_000, 150, 30 / 7), (100, 3, 8), (1, 1, 8)]
)
def test_classes_of_few_texts_are_gone_through_more_often(labelled: int, classes: int, passes: float) -> None:
    assert wanted_epochs(labelled, classes) == pytest.approx(passes)


@given(st.floats(5, 60), COSTS, COSTS, st.floats(0, 0.1), st.integers(10, 1000), st.floats(0, 1))
@settings(max_examples=100)
def test_fewer_new_texts_than_planned_leave_time_for_more_passes(
    minutes: float, answer_s: float, train_s: float, new_s: float, labelled: int, share: float
) -> None:
    speeds = Speeds(answer_s=answer_s, train_s=train_s, new_s=new_s)
    assume(labelled * (answer_s + 0.3 * train_s) < 50 * minutes)
    plan = plan_training(minutes, speeds, labelled=labelled, wanted=4)
    assert plan.predicted_s <= 60 * minutes
    assert refitted(plan, labelled + plan.new) == plan
    less = refitted(plan, labelled + int(share * plan.new))
    assert less.epochs >= plan.epochs * (1 - 1e-9)
    assert less.augment == plan.augment
    assert less.epochs == MOST_EPOCHS or less.predicted_s == pytest.approx(60 * minutes * 0.95, rel=1e-6)


def test_new_texts_are_fewer_where_it_takes_long_to_hold_them_against_others() -> None:
    quick, slow = (
        plan_training(60, Speeds(answer_s=0.01, train_s=0.005, new_s=new_s), labelled=10_000, wanted=4)
        for new_s in (0, 0.1)
    )
    assert slow.new < quick.new / 3
    assert slow.predicted_s == pytest.approx(quick.predicted_s, rel=1e-3)


def test_the_plan_in_a_sentence() -> None:
    plan = plan_training(60, Speeds(answer_s=0.01, train_s=0.005), labelled=10_000, wanted=4)
    assert str(plan) == (
        f"plan for 60 minutes: the teacher answers 10,000 texts and {plan.new:,} new ones at 100 a second, then 4 "
        "passes at 200 a second; 57.0 minutes in all"
    )
    assert f"and {plan.new - 5:,} new ones" in str(refitted(plan, plan.texts + plan.new - 5))
    assert "10,000 texts (4,000 are answered already) and" in str(replace(plan, texts=14_000, answered=4_000))


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf])
def test_minutes_without_meaning_are_refused(minutes: float) -> None:
    with pytest.raises(UsageError, match="--minutes must be above 0"):
        plan_training(minutes, Speeds(answer_s=1, train_s=1), labelled=10, wanted=4)


def test_too_few_minutes_say_how_many_it_takes() -> None:
    with pytest.raises(UsageError, match=r"take about 21\.1 minutes on this machine"):
        plan_training(1, Speeds(answer_s=0.1, train_s=0.1), labelled=10_000, wanted=4)


@given(
    lengths=st.lists(st.integers(1, 512), min_size=1, max_size=3000), batch=st.integers(1, 64), seed=st.integers(0, 99)
)
def test_typical_steps_are_padded_as_all_are(lengths: list[int], batch: int, seed: int) -> None:
    steps = batches(lengths, TrainOptions(batch=batch, epochs=1, seed=seed))
    some = typical_steps(steps, lengths)

    def widths(of: Sequence[Sequence[int]]) -> list[int]:
        return [max(lengths[row] for row in rows) for rows in of]

    assert all(rows in steps for rows in some)
    assert len(some) == min(TIMED_STEPS, len(steps))
    largest_error = (max(widths(steps)) - min(widths(steps))) / len(some)
    assert abs(np.mean(widths(some)) - np.mean(widths(steps))) <= largest_error


def test_speeds_are_those_of_this_machine(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_plan, "TIMED_S", 0.2)
    teacher = import_checkpoint(str(checkpoint("bert")), tmp_path / "torch-fp32")
    rows = labelled_rows(20, seed=1)
    labels = tuple(LABELS.index(label) for _, label in rows)
    data = Workload(name="train", source="memory", texts=tuple(text for text, _ in rows), labels=labels)
    found = measured_speeds(teacher, Lesson(data=data, teacher=teacher), DistillOptions(train=TrainOptions(batch=4)))
    assert 0 < found.answer_s < found.train_s < 1
    with pytest.raises(UsageError):
        measured_speeds(teacher, Lesson(data=data, teacher=None), DistillOptions())
