"""A variant's answers beside the baseline's: what one accuracy for all rows does not show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten import intervals
from hasten.errors import DataError, MeasurementError
from hasten.intervals import Interval
from hasten.measurement import Quality

FLIP_EXAMPLES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """The rows of one class.

    Attributes:
        label: The class.
        n: Rows that belong to it.
        recall: Share of them that the variant answers right, with Wilson's interval.
        baseline_recall: The same of the baseline.
    """

    label: str
    n: int
    recall: Interval
    baseline_recall: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """A text that the variant answers in another way than the baseline.

    Attributes:
        text: The text.
        expected: Its label.
        baseline: The baseline's answer.
        answer: The variant's answer.
    """

    text: str
    expected: str
    baseline: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """A variant's answers beside the baseline's.

    Attributes:
        agreement: Share of rows answered as the baseline does, right or wrong, with Wilson's interval.
        flips: Rows answered in another way.
        examples: The first of them, by row; none where the texts are not at hand.
        calibration_error: Expected calibration error, 0 to 1; None where no confidences were recorded.
        classes: Each class that has rows, the one that loses the most recall first.
    """

    agreement: Interval
    flips: int
    examples: tuple[Flip, ...]
    calibration_error: float | None
    classes: tuple[ClassRow, ...]


def compare_answers(
    quality: Quality, baseline: Quality, *, labels: Sequence[str] = (), texts: Sequence[str] = ()
) -> Answers:
    """Sets a variant's answers beside the baseline's.

    Args:
        quality: The variant's answers.
        baseline: The baseline's, on the same rows.
        labels: Names of the labels by id; the ids themselves if none are given.
        texts: The rows' texts, to show some of those that flipped; none if none are given.

    Returns:
        What changed.

    Raises:
        MeasurementError: The two were not measured on the same rows.
    """
    if quality.expected != baseline.expected:
        raise MeasurementError("answers are compared on the same rows; these two were measured on others")
    ours, theirs = np.asarray(quality.predictions), np.asarray(baseline.predictions)
    flipped = np.flatnonzero(ours != theirs)

    def name(label: int) -> str:
        return labels[label] if labels else str(label)

    examples = tuple(
        Flip(
            text=texts[row], expected=name(quality.expected[row]), baseline=name(baseline.predictions[row]),
            answer=name(quality.predictions[row]),
        )
        for row in map(int, flipped[:FLIP_EXAMPLES])
        if texts
    )  # fmt: skip
    return Answers(
        agreement=intervals.proportion(quality.n - len(flipped), quality.n),
        flips=len(flipped),
        examples=examples,
        calibration_error=quality.calibration_error(),
        classes=_classes(quality, baseline, [name(label) for label in range(max(quality.expected) + 1)]),
    )


def require_better_than_majority(quality: Quality, labels: Sequence[str], *, who: str, rows: str) -> None:
    """Refuses a teacher that is shown to be worse than always giving the most frequent answer.

    Args:
        quality: Its answers.
        labels: Names of the labels by id.
        who: Its name, for the error.
        rows: What it was asked, for the error.

    Raises:
        DataError: The upper limit of its accuracy lies below the share of the most frequent label.
    """
    counts = np.bincount(quality.expected)
    share, accuracy = counts.max() / quality.n, quality.accuracy()
    if accuracy.upper is not None and accuracy.upper < share:
        raise DataError(
            f"{who} has {accuracy.value:.1%} of {quality.n:,} {rows} right; always answering "
            f"{labels[int(counts.argmax())]!r} would have {share:.1%}: is each label the one it was trained on? "
            "--force goes on all the same"
        )


def _classes(quality: Quality, baseline: Quality, names: Sequence[str]) -> tuple[ClassRow, ...]:
    expected, rows = np.asarray(quality.expected), list[ClassRow]()
    for label in map(int, np.unique(expected)):
        of_it = expected == label
        n = int(of_it.sum())
        recall, before = (intervals.proportion(int(answers.right[of_it].sum()), n) for answers in (quality, baseline))
        rows.append(ClassRow(label=names[label], n=n, recall=recall, baseline_recall=before))
    return tuple(sorted(rows, key=lambda row: (row.recall.value - row.baseline_recall.value, row.label)))
