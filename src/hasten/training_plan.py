"""How to spend a number of minutes on a student: speeds are measured here, then passes and texts are planned to fit.

The teacher has to answer each text once, the student goes through all of them several times. What minutes are left
beyond a wanted number of passes over the texts that are there go into more texts, and only where those would be too
many into more passes. That new texts bring much is known (Jiao et al. 2020, "TinyBERT", on its augmentation), but they
are made of the labelled ones and less like what will be asked, so a class of few labelled texts must be gone through
more often. As many passes are wanted first as show 400 texts of each class, within bounds. On validation splits, with
one seed each: on CLINC150, with 93 texts a class, 4 passes did better than 1.65, and 7 no better; on SST-2, with
thousands, 1.5 over new texts too did no worse than 3.9 over fewer, or than 14 in three times the minutes
(`benchmarks/results/plans_clinc150_mpnet.json`, `ingredients.json`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hasten.errors import UsageError
from hasten.mixed_precision import step_in
from hasten.runtime import open_runtime
from hasten.teaching import DistillOptions, Lesson, answers_at_once
from hasten.torch_runtime import load_torch_model
from hasten.torch_training import TrainingSet, TrainOptions, batches, device
from hasten.variant import Variant
from hasten.workload import random_rows

LEAST_WANTED, MOST_WANTED = 1.5, 8.0
CLASS_TEXTS = 400
LEAST_EPOCHS = 0.2
MOST_EPOCHS = 40.0
MOST_NEW_TEXTS = 20.0  # for each training text
RESERVE = 0.05  # for loading, checkpoints and looking at the accuracy
SAMPLE_TEXTS = 4096  # fewer would be sorted into steps with more padding than there is in training
TIMED_STEPS = 8
WARM_UP, TIMED_S = 2, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What a text costs on this machine.

    Attributes:
        answer_s: Seconds for the teacher to answer it.
        train_s: Seconds for a training step of the student, over the texts of the step.
        new_s: Seconds to hold a new text against the validation and test rows, before it is answered.
    """

    answer_s: float
    train_s: float
    new_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """What will be done.

    Attributes:
        minutes: What there is to spend.
        epochs: Passes over all texts.
        texts: Texts that there are: labelled ones and the user's unlabelled ones.
        augment: New texts to make for each labelled one.
        speeds: What the plan rests on.
        predicted_s: Seconds that it will take.
        answered: Texts that the teacher has answered before.
        new: Texts to make.
        unlabelled: Texts among `texts` that are held against the validation and test rows, as new ones are.
    """

    minutes: float
    epochs: float
    texts: int
    augment: float
    speeds: Speeds
    predicted_s: float
    answered: int = 0
    new: int = 0
    unlabelled: int = 0

    def __str__(self) -> str:
        """The plan in a sentence."""
        new = f" and {self.new:,} new ones" if self.new else ""
        before = f" ({self.answered:,} are answered already)" if self.answered else ""
        return (
            f"plan for {self.minutes:g} minutes: the teacher answers {self.texts - self.answered:,} texts{before}{new} "
            f"at {1 / self.speeds.answer_s:,.0f} a second, then {self.epochs:.2g} passes "
            f"at {1 / self.speeds.train_s:,.0f} a second; {self.predicted_s / 60:.1f} minutes in all"
        )


def check_minutes(minutes: float | None, *, guided: bool = False) -> None:
    """Refuses minutes that are no time to plan for.

    Args:
        minutes: What there is to spend; None plans nothing.
        guided: Whether the student looks inside its teacher first, which no plan counts.

    Raises:
        UsageError: They are not above 0, or not finite, or there is guidance too.
    """
    if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
        raise UsageError(f"--minutes must be above 0, not {minutes:g}")
    if minutes is not None and guided:
        raise UsageError("--minutes plans for answers alone; leave out --guide-epochs, or name --epochs instead")


def wanted_epochs(labelled: int, classes: int) -> float:
    """Passes over the texts before minutes go into new ones, 1.5 to 8.

    Args:
        labelled: Texts with labels, at least 1.
        classes: How many labels there are.

    Returns:
        As many as go through `CLASS_TEXTS` texts of a class of average size, if that is within the bounds.
    """
    return min(MOST_WANTED, max(LEAST_WANTED, CLASS_TEXTS * classes / labelled))


def plan_training(
    minutes: float, speeds: Speeds, *, labelled: int, wanted: float, unlabelled: int = 0, answered: int = 0
) -> TrainingPlan:  # fmt: skip
    """Plans passes and texts for a number of minutes.

    Args:
        minutes: What there is to spend, above 0.
        speeds: What a text costs.
        labelled: Texts with labels, at least 1.
        wanted: Passes that come before new texts, above 0; see `wanted_epochs`.
        unlabelled: The user's texts without.
        answered: How many of all these the teacher has answered before.

    Returns:
        The plan; it takes at most `minutes`.

    Raises:
        UsageError: The minutes are none, or too few for the teacher to answer the texts and a part of a pass.
    """
    check_minutes(minutes)
    saved_s, texts = answered * speeds.answer_s - unlabelled * speeds.new_s, labelled + unlabelled
    seconds = 60 * minutes * (1 - RESERVE) + saved_s
    each_s = speeds.answer_s + wanted * speeds.train_s
    most = round(MOST_NEW_TEXTS * labelled)
    new = min(most, max(0, math.floor((seconds - texts * each_s) / (each_s + speeds.new_s))))
    epochs = _passes(seconds, speeds, texts, new)
    if epochs < LEAST_EPOCHS:
        needed = (texts * (speeds.answer_s + LEAST_EPOCHS * speeds.train_s) - saved_s) / (1 - RESERVE) / 60
        raise UsageError(
            f"--minutes {minutes:g} are too few: {texts:,} texts to answer and a part of a pass take about "
            f"{needed:.1f} minutes on this machine; give more, or fewer texts"
        )
    return TrainingPlan(
        minutes=minutes, epochs=epochs, texts=texts, augment=new / labelled, speeds=speeds, answered=answered, new=new,
        unlabelled=unlabelled, predicted_s=_seconds(speeds, texts, new, epochs) - saved_s,
    )  # fmt: skip


def refitted(plan: TrainingPlan, texts: int) -> TrainingPlan:
    """The plan once the new texts are there: fewer than planned leave time for more passes.

    Args:
        plan: As it was made.
        texts: How many texts there are, new ones included, at least 1.

    Returns:
        The plan with its passes, and the seconds they take; `augment` stays what was asked for.
    """
    saved_s = plan.answered * plan.speeds.answer_s - plan.unlabelled * plan.speeds.new_s
    new = max(0, texts - plan.texts)
    if texts == plan.texts + plan.new:
        return plan
    there = texts - new
    epochs = _passes(60 * plan.minutes * (1 - RESERVE) + saved_s, plan.speeds, there, new)
    return replace(plan, epochs=epochs, new=new, predicted_s=_seconds(plan.speeds, there, new, epochs) - saved_s)


def _passes(seconds: float, speeds: Speeds, texts: int, new: int) -> float:
    """Passes over all texts for which there is time beside the answers and the making of new ones."""
    left_s = seconds - (texts + new) * speeds.answer_s - new * speeds.new_s
    return min(MOST_EPOCHS, left_s / ((texts + new) * speeds.train_s))


def _seconds(speeds: Speeds, texts: int, new: int, epochs: float) -> float:
    """What all of it takes, with every text answered."""
    return (texts + new) * (speeds.answer_s + epochs * speeds.train_s) + new * speeds.new_s


def measured_speeds(start: Variant, lesson: Lesson, options: DistillOptions) -> Speeds:
    """Times the teacher's answers and the student's steps on some of the texts.

    Args:
        start: The student, untrained.
        lesson: The texts and the teacher.
        options: How it will be trained.

    Returns:
        Seconds a text.

    Raises:
        UsageError: There is no teacher to plan for.
    """
    if lesson.teacher is None:
        raise UsageError("a plan of minutes is for a student with a teacher")
    every = lesson.texts
    texts = [every[row] for row in random_rows(len(every), SAMPLE_TEXTS, seed=options.train.seed)]
    return Speeds(
        answer_s=_answer_seconds(lesson.teacher, texts, options.train.threads),
        train_s=_step_seconds(start, texts, options.train),
    )


def _answer_seconds(teacher: Variant, texts: Sequence[str], threads: int) -> float:
    """Seconds a text of a teacher that answers as `teacher_logits` lets it."""
    runtime, size = open_runtime(teacher, threads=threads), answers_at_once(teacher)
    encodings = sorted(runtime.encode(texts), key=len)
    groups = [range(at, min(at + size, len(encodings))) for at in range(0, len(encodings), size)]

    def answer(rows: Sequence[int]) -> None:
        runtime.infer([encodings[row] for row in rows])

    return seconds_a_text(answer, typical_steps(groups, [len(e) for e in encodings]))


def _step_seconds(start: Variant, texts: Sequence[str], options: TrainOptions) -> float:
    """Seconds a text of a student's training step."""
    import torch

    torch.set_num_threads(options.threads)
    model = load_torch_model(start).to(device())
    data = TrainingSet.of(start, model, texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)

    def step(rows: Sequence[int]) -> None:
        optimizer.zero_grad()
        inputs = data.inputs(rows, device())
        with step_in(options.precision, device(), inputs["input_ids"].shape[1]):
            value = model(**inputs).logits.float().square().mean()
        float(value.detach())  # waits for the device, as training does
        value.backward()
        optimizer.step()

    lengths = [len(e) for e in data.encodings]
    return seconds_a_text(step, typical_steps(batches(lengths, replace(options, epochs=1)), lengths))


def typical_steps(steps: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Sequence[int]]:
    """A few steps that stand for all: at equal distances in the order of their padded lengths.

    Args:
        steps: Row indices by step, at least one step of at least one row.
        lengths: Length of each row in tokens; shape [rows].

    Returns:
        At most `TIMED_STEPS` of the steps.
    """
    ordered = sorted(steps, key=lambda rows: max(lengths[row] for row in rows))
    count = min(TIMED_STEPS, len(ordered))
    return [ordered[(2 * at + 1) * len(ordered) // (2 * count)] for at in range(count)]


def seconds_a_text(run: Callable[[Sequence[int]], object], steps: Sequence[Sequence[int]]) -> float:
    """Times some steps, gone through in turn for a while.

    Args:
        run: Runs a step.
        steps: Row indices by step; at least one.

    Returns:
        Seconds a text.
    """
    for rows in steps[-WARM_UP:]:
        run(rows)
    began, texts = time.perf_counter(), 0
    while time.perf_counter() - began < TIMED_S:
        for rows in steps:
            run(rows)
            texts += len(rows)
    return (time.perf_counter() - began) / texts
