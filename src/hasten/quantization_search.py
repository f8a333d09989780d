"""Which INT8? Ways to quantize are tried on the user's texts; fp32 comes back where it must.

Ranges of activations can be kept whole or cut, and which is better hangs on the model's outliers. Weights of 8 bits are
finer than of 7, but can saturate on CPUs without VNNI, and whether they do hangs on the weights. So each way is carried
out, and the one that moves the logits of training texts least is taken. Its loss of accuracy against the fp32 parent is
then judged on the validation split. Where more is lost than allowed, if only by the estimate, smoothing is tried, which
costs an operator before most products, and then smoothing of no more products than it takes. If more is shown to be
lost than allowed even so, the products of activations with weights are put back to fp32 one by one, the most sensitive
first, until it no longer is.

Source: Nagel et al. 2021, "A White Paper on Neural Network Quantization", on range setting and on the analysis of
layers one at a time. We differ in the criterion: logits of the user's texts rather than errors of tensors. How many
products to smooth is told from their errors alone, as if those were independent: then their squares add up.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from hasten.files import beside
from hasten.intervals import Interval, points_lost
from hasten.quantization import (
    Calibration,
    QuantizeOptions,
    can_saturate,
    quantize_graph,
    smoothed_by_operators,
)
from hasten.runtime import Logits, OnnxRuntime, predict_logits
from hasten.variant import Variant, copy_configuration
from hasten.workload import Workload

GRAPH = "model.onnx"
CALIBRATIONS: tuple[Calibration, ...] = ("minmax", "percentile", "entropy")
SMOOTHINGS = (0.5, 0.7, 0.8)
SENSITIVITY_TEXTS = 64
SPARED = 0.1  # by how much more logits may move, as far as can be told, for smoothing fewer products

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

    def __str__(self) -> str:
        """The way and what it does, in a line."""
        moved = f"logits move by {self.mean_logit_difference:.3g} on average"
        return f"{in_words(self.options)}: {moved}, answers that differ: {self.label_flips}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a search came to.

    Attributes:
        options: The way that was chosen.
        lost_points: Points of accuracy lost against the fp32 parent on the validation split, with the two-sided 95 %
            interval; negative where it gained.
        loss: Whether the interval shows the loss to be allowed (`holds`), to be `too large`, or neither.
        candidates: All ways that were compared.
        sensitivity: Products by the mean move of a logit that quantizing each alone causes, worst first: of the chosen
            way if some had to be put back, of the way before smoothing if that was chosen, else empty.
    """

    options: QuantizeOptions
    lost_points: Interval
    loss: Loss
    candidates: list[Candidate]
    sensitivity: dict[str, float]

    def __str__(self) -> str:
        """The way and its loss, in a line."""
        lost = self.lost_points
        known = "" if lost.lower is None or lost.upper is None else f" ({lost.lower:.2f} to {lost.upper:.2f})"
        return f"{in_words(self.options)}; {lost.value:.2f} points lost on the validation split{known}: {self.loss}"


def in_words(way: QuantizeOptions) -> str:
    """What ways of a search differ in."""
    parts = [f"ranges by {way.calibration}", f"weights of {7 if way.reduces_range else 8} bits"]
    if way.smoothing:
        before = "every product" if way.smoothed is None else f"the products that tell ({len(way.smoothed)})"
        parts.append(f"smoothing {way.smoothing:g} before {before}")
    if way.keep:
        parts.append(f"products in fp32: {len(way.keep)}")
    return ", ".join(parts)


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
        self._tried: list[Candidate] = []
        self._written: QuantizeOptions | None = None
        self._before = self._parent(question.texts)
        self._right = self._parent(question.valid.texts).argmax(-1) == np.asarray(question.valid.labels)

    def run(self) -> Choice:
        """The best way, then fp32 for products until the loss is not shown to be too large."""
        options = self._plain()
        lost, sensitivity = self._lost_points(options), dict[str, float]()
        if lost.value > self.question.max_lost_points and not options.smoothing:
            smoothed = self._smoothed(options)
            if self._rank(with_it := self._lost_points(smoothed.options)) < self._rank(lost):
                sensitivity = self._sensitivity(options)
                options, lost = self._smoothed_where_it_tells(smoothed, (lost, with_it), sensitivity)
        if self._verdict(lost) == "too large":
            sensitivity = self._sensitivity(options)
            for kept in range(1, len(sensitivity) // 2 + 1):
                options = replace(options, keep=(*self.question.options.keep, *tuple(sensitivity)[:kept]))
                lost = self._lost_points(options)
                if self._verdict(lost) != "too large":
                    break
        return Choice(
            options=options, lost_points=lost, loss=self._verdict(lost), candidates=self._tried, sensitivity=sensitivity
        )

    def _plain(self) -> QuantizeOptions:
        """The ranges of weights first, then, with the better one, the ranges of activations."""
        start = replace(self.question.options, method="static")
        ranges = (False, True) if start.reduce_range is None and can_saturate() else (start.reduces_range,)
        first, *others = CALIBRATIONS
        found = [self._candidate(replace(start, calibration=first, reduce_range=narrow)) for narrow in ranges]
        finer = _best(found).options
        for number, calibration in enumerate(others):
            if self.progress is not None:
                self.progress(number + 1, len(CALIBRATIONS))
            found.append(self._candidate(replace(finer, calibration=calibration)))
        return _best(found).options

    def _smoothed(self, plain: QuantizeOptions) -> Candidate:
        return _best([self._candidate(replace(plain, smoothing=strength)) for strength in SMOOTHINGS])

    def _smoothed_where_it_tells(
        self, smoothed: Candidate, lost: tuple[Interval, Interval], sensitivity: dict[str, float]
    ) -> tuple[QuantizeOptions, Interval]:
        """Smoothing of as few products as it takes, worst first, or of all where that turns out to be better."""
        by_operators = smoothed_by_operators(self.question.source)
        names = [name for name in sensitivity if name in by_operators]
        errors = np.array([0.0, *(sensitivity[name] ** 2 for name in names)])
        of_the_rest = errors.sum() - errors.cumsum()  # after 0, 1, 2 ... products
        spared = smoothed.mean_logit_difference**2 * ((1 + SPARED) ** 2 - 1)
        count = int(np.argmax(of_the_rest <= max(spared, of_the_rest[-1])))
        fewer = self._candidate(replace(smoothed.options, smoothed=tuple(names[:count])))
        without, with_all = lost
        with_fewer, allowed = self._lost_points(fewer.options), self.question.max_lost_points
        known = [VERDICTS.index(self._verdict(loss)) for loss in (with_fewer, with_all)]
        as_near = fewer.mean_logit_difference <= (1 + SPARED) * smoothed.mean_logit_difference
        is_as_good = with_fewer.value <= max(with_all.value, allowed) or (as_near and with_all.value > allowed)
        if known[0] <= known[1] and self._rank(with_fewer) < self._rank(without) and is_as_good:
            return fewer.options, with_fewer
        return smoothed.options, with_all

    def _candidate(self, way: QuantizeOptions) -> Candidate:
        before, after = self._before, self._quantized(way, self.question.texts)
        flips = int((after.argmax(-1) != before.argmax(-1)).sum())
        self._tried.append(Candidate(options=way, mean_logit_difference=_move(after, before), label_flips=flips))
        return self._tried[-1]

    def _parent(self, texts: Sequence[str]) -> Logits:
        return predict_logits(OnnxRuntime(self.question.source, threads=self.question.threads), texts)

    def _quantized(self, options: QuantizeOptions, texts: Sequence[str]) -> Logits:
        self._quantize(options)
        draft = Variant(path=self.folder, manifest=self.question.source.manifest)
        return predict_logits(OnnxRuntime(draft, threads=self.question.threads), texts)

    def _lost_points(self, options: QuantizeOptions) -> Interval:
        answers = self._quantized(options, self.question.valid.texts).argmax(-1)
        return points_lost(answers == np.asarray(self.question.valid.labels), self._right)

    def _verdict(self, lost: Interval) -> Loss:
        if lost.upper is not None and lost.upper <= self.question.max_lost_points:
            return "holds"
        return "too large" if lost.is_above(self.question.max_lost_points) else "undecided"

    def _rank(self, lost: Interval) -> tuple[int, float]:
        """What is known of a loss first, then its estimate; the smaller, the better."""
        return VERDICTS.index(self._verdict(lost)), lost.value

    def _quantize(self, options: QuantizeOptions, plain: Path | None = None) -> None:
        """Writes the graph of this way, unless it was the last one that was written."""
        if options == self._written and plain is None:
            return
        made = (options.calibration, options.smoothing, options.smoothed)
        ranges = self.folder / f"{hashlib.sha256(repr(made).encode()).hexdigest()}.json"
        texts = self.question.texts
        quantize_graph(self.question.source, self.folder / GRAPH, options, texts, ranges=ranges, plain=plain)
        self._written = options

    def _sensitivity(self, options: QuantizeOptions) -> dict[str, float]:
        """How far logits move when one product alone, with those of its weights, is quantized, worst first."""
        from hasten.sensitivity import sensitivities

        plain = self.folder / "plain.onnx"
        self._quantize(options, plain)
        runtime = OnnxRuntime(self.question.source, threads=1)
        encodings = runtime.encode(self.question.texts[:SENSITIVITY_TEXTS])
        feeds = [runtime.feed([encoding]) for encoding in encodings]
        return sensitivities(plain, self.folder / GRAPH, feeds, threads=self.question.threads)


def _best(candidates: Sequence[Candidate]) -> Candidate:
    return min(candidates, key=lambda candidate: candidate.mean_logit_difference)


def _move(after: Logits, before: Logits) -> float:
    return float(np.abs(after - before).max(axis=-1).mean())
