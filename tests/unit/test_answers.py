"""Answers beside the baseline's, against scikit-learn where it has the same figure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import recall_score

from hasten.answers import FLIP_EXAMPLES, compare_answers, require_better_than_majority
from hasten.errors import DataError, MeasurementError
from hasten.measurement import Quality

LABELS = ("bad", "good", "odd")
ROWS = st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=60)


@given(ROWS)
def test_counts_are_those_of_the_rows(rows: list[tuple[int, int, int]]) -> None:
    ours, theirs, expected = map(tuple, zip(*rows, strict=True))
    texts = [f"text {row}" for row in range(len(rows))]
    found = compare_answers(
        Quality(predictions=ours, expected=expected), Quality(predictions=theirs, expected=expected), labels=LABELS,
        texts=texts,
    )  # fmt: skip
    flipped = [row for row in range(len(rows)) if ours[row] != theirs[row]]
    assert found.flips == len(flipped)
    assert found.agreement.value == pytest.approx(1 - len(flipped) / len(rows))
    assert [flip.text for flip in found.examples] == [texts[row] for row in flipped][:FLIP_EXAMPLES]
    assert all(flip.baseline != flip.answer for flip in found.examples)
    assert sum(row.n for row in found.classes) == len(rows)
    recalls = recall_score(expected, ours, labels=[0, 1, 2], average=None, zero_division=0.0)
    assert {row.label: row.recall.value for row in found.classes} == pytest.approx(
        {LABELS[label]: recalls[label] for label in set(expected)}
    )
    losses = [row.recall.value - row.baseline_recall.value for row in found.classes]
    assert losses == sorted(losses)


def test_the_calibration_error_weighs_the_gaps_of_a_reliability_curve() -> None:
    random = np.random.default_rng(3)
    confidences = random.uniform(0.34, 1.0, 500)
    right = random.uniform(size=500) < confidences**2
    quality = Quality(
        predictions=tuple(right.astype(int).tolist()), expected=(1,) * 500, confidences=tuple(confidences.tolist())
    )
    accuracy, confidence = calibration_curve(right, confidences, n_bins=15)
    sizes = np.histogram(confidences, np.linspace(0, 1, 16))[0]
    expected = np.sum(sizes[sizes > 0] * np.abs(accuracy - confidence)) / 500
    assert quality.calibration_error() == pytest.approx(expected)
    sure = Quality(predictions=(1, 1), expected=(1, 1), confidences=(1.0, 1.0))
    assert sure.calibration_error() == 0
    assert Quality(predictions=(1,), expected=(1,)).calibration_error() is None


def test_without_names_and_texts_the_ids_stand_and_no_text_is_shown() -> None:
    found = compare_answers(Quality(predictions=(0, 1), expected=(0, 0)), Quality(predictions=(0, 0), expected=(0, 0)))
    assert (found.flips, found.examples) == (1, ())
    assert [row.label for row in found.classes] == ["0"]


def test_other_rows_are_refused() -> None:
    with pytest.raises(MeasurementError, match="same rows"):
        compare_answers(Quality(predictions=(0,), expected=(0,)), Quality(predictions=(0,), expected=(1,)))


def test_what_is_shown_to_be_worse_than_one_label_is_refused() -> None:
    expected = (0,) * 60 + (1,) * 40
    worse = Quality(predictions=(1,) * 70 + (0,) * 30, expected=expected)
    with pytest.raises(DataError, match=r"10\.0% of 100 rows right; always answering 'bad' would have 60\.0%"):
        require_better_than_majority(worse, LABELS, who="model", rows="rows")
    near = Quality(predictions=(0,) * 55 + (1,) * 5 + (0,) * 40, expected=expected)
    require_better_than_majority(near, LABELS, who="model", rows="rows")
