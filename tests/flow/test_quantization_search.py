"""The search for a way to quantize: what it tries, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_smoothing import TEXTS, exported, outliers, with_graph

from hasten import quantization_search
from hasten.intervals import Interval
from hasten.quantization import QuantizeOptions, smoothed_by_operators
from hasten.quantization_search import (
    SMOOTHINGS,
    SPARED,
    Candidate,
    Choice,
    Question,
    _Search,
    choose_quantization,
)
from hasten.runtime import OnnxRuntime, predict_logits
from hasten.variant import Variant
from hasten.workload import Workload


def searched(source: Variant, texts: Sequence[str], valid: Workload, work: Path) -> Choice:
    question = Question(
        source=source, texts=texts, valid=valid, options=QuantizeOptions(), max_lost_points=0.3, threads=1
    )  # fmt: skip
    return choose_quantization(question, work)


def test_an_answer_that_is_never_right_loses_no_share(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = exported("bert", checkpoint, tmp_path)
    answers = predict_logits(OnnxRuntime(source, threads=1), TEXTS).argmax(-1)
    wrong = tuple(int(label + 1) % len(source.labels) for label in answers)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=wrong)
    choice = searched(source, TEXTS[:5], valid, tmp_path)
    assert (choice.loss, choice.lost_points.lower, choice.lost_points.upper) == ("undecided", None, None)


@pytest.mark.parametrize(("points_lost", "smooths"), [(0.5, True), (0.3, False), (0.0, False)])
def test_the_search_smooths_where_more_is_lost_than_allowed_by_the_estimate(
    points_lost: float, smooths: bool, checkpoint: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def lost(_search: Any, _options: QuantizeOptions) -> Interval:
        return Interval(value=points_lost, lower=-1.0, upper=2.0)

    monkeypatch.setattr("hasten.quantization_search._Search._lost_points", lost)
    source = with_graph(exported("bert", checkpoint, tmp_path), tmp_path / "outliers", outliers)
    answers = predict_logits(OnnxRuntime(source, threads=1), TEXTS).argmax(-1)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=tuple(int(label) for label in answers))
    choice = searched(source, TEXTS, valid, tmp_path)
    tried = [candidate.options.smoothing for candidate in choice.candidates]
    assert tuple(sorted(set(tried))) == ((0.0, *SMOOTHINGS) if smooths else (0.0,))
    least = min(choice.candidates, key=lambda candidate: candidate.mean_logit_difference)
    assert (least.options.smoothing > 0) == smooths


@pytest.mark.parametrize(("plain", "smoothed"), [(1.0, 0.4), (0.4, 1.0)])
def test_where_neither_decides_the_smaller_estimate_is_taken(
    plain: float, smoothed: float, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_search: Any, options: QuantizeOptions) -> Interval:
        return Interval(value=smoothed if options.smoothing else plain, lower=-1.0, upper=2.0)

    monkeypatch.setattr("hasten.quantization_search._Search._lost_points", lost)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=(0,) * len(TEXTS))
    source = exported("bert", checkpoint, tmp_path)
    choice = searched(source, TEXTS[:5], valid, tmp_path)
    assert (choice.loss, choice.lost_points.value) == ("undecided", 0.4)
    assert bool(choice.options.smoothing) == (smoothed < plain)


@pytest.mark.parametrize(
    ("of_all", "of_fewer", "further", "takes_fewer"),
    [
        (0.2, 0.3, 2.0, True),  # loses no more than allowed
        (0.5, 0.5, 2.0, True),  # no more than all of them smoothed
        (0.2, 0.31, 2.0, False),
        (0.5, 0.6, 2.0, False),
        (0.5, 0.6, 1.1, True),  # neither is allowed, and the logits are as near
        (0.2, 0.6, 1.1, False),
        (0.5, 1.0, 1.1, False),  # no better than without smoothing
        (0.5, 2.0, 1.0, False),  # shown to be too large
    ],
)
def test_no_more_products_are_smoothed_than_it_takes(
    of_all: float, of_fewer: float, further: float, takes_fewer: bool, checkpoint: Callable[[str], Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def lost(_search: _Search, options: QuantizeOptions) -> Interval:
        value = (of_all if options.smoothed is None else of_fewer) if options.smoothing else 1.0
        return Interval(value=value, lower=value - 1.5, upper=value + 1.5)

    def candidate(search: _Search, options: QuantizeOptions) -> Candidate:
        move = 1.0 if options.smoothed is None else further
        return replace(as_it_is(search, options), mean_logit_difference=move / (options.smoothing + 0.1))

    as_it_is = _Search._candidate
    monkeypatch.setattr(_Search, "_lost_points", lost)
    monkeypatch.setattr(_Search, "_candidate", candidate)
    source = with_graph(exported("bert", checkpoint, tmp_path), tmp_path / "outliers", outliers)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=(0,) * len(TEXTS))
    choice = searched(source, TEXTS, valid, tmp_path)
    fewer = choice.candidates[-1].options
    assert {candidate.options.smoothed for candidate in choice.candidates[:-1]} == {None}
    assert fewer.smoothed == ()  # with such an error of all of them, none would add to it
    assert choice.options == (fewer if takes_fewer else replace(fewer, smoothed=None))
    assert choice.lost_points.value == (of_fewer if takes_fewer else of_all)
    assert next(iter(choice.sensitivity)).endswith("qkv_0")


def test_the_products_that_are_smoothed_are_those_whose_error_tells(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_search: _Search, options: QuantizeOptions) -> Interval:
        value = 0.0 if options.smoothing else 1.0
        return Interval(value=value, lower=value - 1.5, upper=value + 1.5)

    monkeypatch.setattr(_Search, "_lost_points", lost)
    source = with_graph(exported("bert", checkpoint, tmp_path), tmp_path / "outliers", outliers)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=(0,) * len(TEXTS))
    choice = searched(source, TEXTS, valid, tmp_path)
    plain, *smoothed, fewer = choice.candidates
    of_all = min(way.mean_logit_difference for way in smoothed if way.options.smoothing)
    worst, *_ = choice.sensitivity
    dear = smoothed_by_operators(source)
    assert choice.options.smoothed == fewer.options.smoothed == (worst,)
    rest = np.array([move for name, move in choice.sensitivity.items() if name in dear - {worst}])
    assert np.hypot(of_all, np.linalg.norm(rest)) <= (1 + SPARED) * of_all < np.hypot(of_all, choice.sensitivity[worst])
    assert fewer.mean_logit_difference <= (1 + SPARED) * of_all
    assert of_all < 0.5 * plain.mean_logit_difference


@pytest.mark.parametrize(
    ("way", "interval", "line"),
    [
        (
            QuantizeOptions(reduce_range=False), Interval(value=0.6, lower=-0.021, upper=1.4),
            "ranges by minmax, weights of 8 bits; 0.60 points lost on the validation split (-0.02 to 1.40): undecided",
        ),
        (
            QuantizeOptions(reduce_range=True, calibration="entropy", smoothing=0.5, smoothed=("a", "b"), keep=("c",)),
            Interval(value=-1.0, lower=None, upper=None),
            "ranges by entropy, weights of 7 bits, smoothing 0.5 before the products that tell (2), "
            "products in fp32: 1; -1.00 points lost on the validation split: undecided",
        ),
        (
            QuantizeOptions(reduce_range=False, smoothing=0.8), Interval(value=0.0, lower=0.0, upper=0.0),
            "ranges by minmax, weights of 8 bits, smoothing 0.8 before every product; "
            "0.00 points lost on the validation split (0.00 to 0.00): undecided",
        ),
    ],
)  # fmt: skip
def test_a_choice_reads_as_a_line(way: QuantizeOptions, interval: Interval, line: str) -> None:
    assert str(Choice(options=way, lost_points=interval, loss="undecided", candidates=[], sensitivity={})) == line


def test_products_go_back_to_fp32_one_by_one_until_the_loss_is_allowed(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_search: Any, options: QuantizeOptions) -> Interval:
        healed = len(options.keep) >= 2
        return Interval(value=0.1, lower=-0.1, upper=0.2) if healed else Interval(value=5.0, lower=4.0, upper=6.0)

    monkeypatch.setattr(quantization_search, "CALIBRATIONS", ("minmax",))
    monkeypatch.setattr(quantization_search._Search, "_lost_points", lost)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=(0,) * len(TEXTS))
    source = exported("bert", checkpoint, tmp_path)
    choice = searched(source, TEXTS[:5], valid, tmp_path)
    assert (choice.loss, choice.options.keep) == ("holds", tuple(choice.sensitivity)[:2])
