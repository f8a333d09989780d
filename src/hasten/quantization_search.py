"""Which INT8? Ways to quantize are tried on the user's texts; fp32 comes back where it must.

Ranges of activations can be kept whole or cut, and which is better hangs on the model's outliers. Weights of 8 bits are
finer than of 7, but can saturate on CPUs without VNNI, and whether they do hangs on the weights. So each way is carried
out, and the one that moves the logits of training texts least is taken. Its loss of accuracy against the fp32 parent is
then judged on the validation split. Where more is lost than allowed, if only by the estimate, smoothing is tried,
which costs a few operators. If more is shown to be lost than allowed even so, the products of activations with weights
are put back to fp32 one by one, the most sensitive first, until it no longer is.

Source: Nagel et al. 2021, "A White Paper on Neural Network Quantization", on range setting and on the analysis of
layers one at a time. We differ in the criterion: logits of the user's texts rather than errors of tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from hasten.files import beside
from hasten.intervals import Interval, paired_ratio
from hasten.quantization import Calibration, QuantizeOptions, can_saturate, products, quantize_graph
from hasten.runtime import Logits, OnnxRuntime, predict_logits
from hasten.variant import Variant, copy_configuration
from hasten.workload import Workload

CALIBRATIONS: tuple[Calibration, ...] = ("minmax", "percentile", "entropy")
SMOOTHINGS = (0.5, 0.7, 0.8)
SENSITIVITY_TEXTS = 64

Progress = Callable[[int, int], None]
Loss = Literal["holds", "undecided", "too large"]
VERDICTS: tuple[Loss, ...] = ("holds", "undecided", "too large")  # from best to worst


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to quantize, and what it does to the logits of training texts.

    Attributes:
        options: The way.
        mean_logit_difference: Mean over texts of the largest move of a logit against the fp32 parent.
        label_flips: Answers that differ from the parent's.
    """

    options: QuantizeOptions
    mean_logit_difference: float
    label_flips: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a search came to.

    Attributes:
        options: The way that was chosen.
        lost_points: Points of accuracy lost against the fp32 parent on the validation split, with the two-sided 95 %
            interval; negative where it gained.
        loss: Whether the interval shows the loss to be allowed (`holds`), to be `too large`, or neither.
        candidates: All ways that were compared.
        sensitivity: Products by the mean move of a logit that quantizing each alone causes, worst first; empty where
            none had to be put back.
    """

    options: QuantizeOptions
    lost_points: Interval
    loss: Loss
    candidates: list[Candidate]
    sensitivity: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a search depends on.

    Attributes:
        source: The fp32 ONNX variant.
        texts: Texts of the training side, to calibrate on and to compare logits on.
        valid: Labelled texts to judge by.
        options: Where to start; its calibration is replaced, and its range where it leaves that open.
        max_lost_points: Points of accuracy that may be lost against the parent.
        threads: Threads for an inference.
    """

    source: Variant
    texts: Sequence[str]
    valid: Workload
    options: QuantizeOptions
    max_lost_points: float
    threads: int


def choose_quantization(question: Question, work: Path, progress: Progress | None = None) -> Choice:
    """Compares ways to quantize, judges the best, puts products back to fp32 where it loses too much.

    Args:
        question: The parent, the texts, the data to judge by.
        work: A folder to keep graphs in meanwhile.
        progress: Told how many of how many ways have been tried.

    Returns:
        The way to quantize, with its loss; `too large` only if half of the products in fp32 did not help.
    """
    folder = beside(work / "search")
    try:
        folder.mkdir(parents=True)
        copy_configuration(question.source, folder)
        return _Search(question, folder, progress).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Search:
    """One search, in a folder of its own; ranges are calibrated once a method."""

    def __init__(self, question: Question, folder: Path, progress: Progress | None) -> None:
        self.question, self.folder, self.progress = question, folder, progress
        self._before = self._parent(question.texts)
        self._right = self._parent(question.valid.texts).argmax(-1) == np.asarray(question.valid.labels)

    def run(self) -> Choice:
        """The best way, then fp32 for products until the loss is not shown to be too large."""
        candidates, sensitivity = self._plain(), dict[str, float]()
        options = _best(candidates)
        lost = self._lost_points(options)
        if lost.value > self.question.max_lost_points and not options.smoothing:
            smoothed = self._smoothed(options)
            candidates += smoothed
            other = self._lost_points(_best(smoothed))
            if self._rank(other) < self._rank(lost):
                options, lost = _best(smoothed), other
        if self._verdict(lost) == "too large":
            sensitivity = self._sensitivity(options)
            for kept in range(1, len(sensitivity) // 2 + 1):
                options = replace(options, keep=tuple(sensitivity)[:kept])
                lost = self._lost_points(options)
                if self._verdict(lost) != "too large":
                    break
        return Choice(
            options=options, lost_points=lost, loss=self._verdict(lost), candidates=candidates, sensitivity=sensitivity
        )

    def _plain(self) -> list[Candidate]:
        """The ranges of weights first, then, with the better one, the ranges of activations."""
        start = self.question.options
        ranges = (False, True) if start.reduce_range is None and can_saturate() else (start.reduces_range,)
        first, *others = CALIBRATIONS
        found: list[Candidate] = []
        for reduce_range in ranges:
            found.append(self._candidate(replace(start, calibration=first, reduce_range=reduce_range)))
        finer = _best(found)
        for number, calibration in enumerate(others):
            if self.progress is not None:
                self.progress(number + 1, len(CALIBRATIONS))
            found.append(self._candidate(replace(finer, calibration=calibration)))
        return found

    def _smoothed(self, plain: QuantizeOptions) -> list[Candidate]:
        return [self._candidate(replace(plain, smoothing=strength)) for strength in SMOOTHINGS]

    def _candidate(self, way: QuantizeOptions) -> Candidate:
        before, after = self._before, self._quantized(way, self.question.texts)
        flips = int((after.argmax(-1) != before.argmax(-1)).sum())
        return Candidate(options=way, mean_logit_difference=_move(after, before), label_flips=flips)

    def _parent(self, texts: Sequence[str]) -> Logits:
        return predict_logits(OnnxRuntime(self.question.source, threads=self.question.threads), texts)

    def _quantized(self, options: QuantizeOptions, texts: Sequence[str]) -> Logits:
        ranges = self.folder / f"{options.calibration}-{options.smoothing}.json"
        quantize_graph(self.question.source, self.folder / "model.onnx", options, self.question.texts, ranges=ranges)
        draft = Variant(path=self.folder, manifest=self.question.source.manifest)
        return predict_logits(OnnxRuntime(draft, threads=self.question.threads), texts)

    def _lost_points(self, options: QuantizeOptions) -> Interval:
        labels, before = np.asarray(self.question.valid.labels), self._right
        after = self._quantized(options, self.question.valid.texts).argmax(-1) == labels
        if not before.any():  # of a student that has learnt nothing no share can be kept
            return Interval(value=-100 * float(after.mean()), lower=None, upper=None)
        points, kept = 100 * float(before.mean()), paired_ratio(after, before)
        lower, upper = (None if limit is None else points * (1 - limit) for limit in (kept.upper, kept.lower))
        return Interval(value=points * (1 - kept.value), lower=lower, upper=upper)

    def _verdict(self, lost: Interval) -> Loss:
        if lost.upper is not None and lost.upper <= self.question.max_lost_points:
            return "holds"
        return "too large" if lost.lower is not None and lost.lower > self.question.max_lost_points else "undecided"

    def _rank(self, lost: Interval) -> tuple[int, float]:
        """What is known of a loss first, then its estimate; the smaller, the better."""
        return VERDICTS.index(self._verdict(lost)), lost.value

    def _sensitivity(self, options: QuantizeOptions) -> dict[str, float]:
        """How far logits move when one product alone, with those of its weights, is quantized, worst first."""
        every, moves = products(self.question.source), dict[str, float]()
        first = {weights: name for name, weights in reversed(every.items())}  # stands for all that share the weights
        for weights, name in reversed(first.items()):
            rest = tuple(other for other in every if every[other] != weights)
            after = self._quantized(replace(options, keep=rest), self.question.texts[:SENSITIVITY_TEXTS])
            moves[name] = _move(after, self._before[:SENSITIVITY_TEXTS])
        return dict(sorted(moves.items(), key=lambda move: -move[1]))


def _best(candidates: Sequence[Candidate]) -> QuantizeOptions:
    return min(candidates, key=lambda candidate: candidate.mean_logit_difference).options


def _move(after: Logits, before: Logits) -> float:
    return float(np.abs(after - before).max(axis=-1).mean())
