"""Which INT8? Ways to calibrate are tried and judged by the user's validation data; fp32 comes back where it must.

Ranges of activations can be kept whole or cut, and which is better hangs on the model's outliers. Each way is carried
out and its answers compared with those of the fp32 parent. If even the best loses more accuracy than allowed, the
products of activations with weights are put back to fp32 one by one, the most sensitive first, until the loss is small
enough.

Source: Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3 (range setting) and section 3.4
(the order of products by the loss that each causes alone). We differ in what decides: labels of the validation data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hasten.intervals import Interval, paired_ratio
from hasten.quantization import Calibration, QuantizeOptions, products, quantize_graph
from hasten.runtime import Logits, OnnxRuntime, predict_logits
from hasten.variant import Variant, copy_configuration
from hasten.workload import Workload

CALIBRATIONS: tuple[Calibration, ...] = ("minmax", "percentile", "entropy")
SENSITIVITY_TEXTS = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to quantize, and what it cost on the validation data.

    Attributes:
        options: The way.
        accuracy: Share of right answers, 0 to 1.
        retention: Accuracy over that of the fp32 parent, with its two-sided 95 % interval.
        lost_points: Points of accuracy lost against the fp32 parent; negative where it gained.
        label_flips: Answers that differ from the fp32 parent's.
        mean_logit_difference: Mean over texts of the largest move of a logit.
        chosen: Whether this is the way that was taken.
    """

    options: QuantizeOptions
    accuracy: float
    retention: Interval
    lost_points: float
    label_flips: int
    mean_logit_difference: float
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a search came to.

    Attributes:
        candidates: All that were tried, in their order; one is chosen.
        sensitivity: Products by the mean move of a logit that quantizing each alone causes, worst first; empty where
            none had to be put back.
        holds: Whether the chosen one loses no more than allowed.
    """

    candidates: list[Candidate]
    sensitivity: dict[str, float]
    holds: bool

    @property
    def options(self) -> QuantizeOptions:
        """The way that was chosen."""
        return next(candidate.options for candidate in self.candidates if candidate.chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a search depends on.

    Attributes:
        source: The fp32 ONNX variant.
        texts: Texts of the training side to calibrate on.
        valid: Labelled texts to judge by.
        options: Where to start; its calibration is replaced.
        max_lost_points: Points of accuracy that may be lost against the parent.
        threads: Threads for an inference.
    """

    source: Variant
    texts: Sequence[str]
    valid: Workload
    options: QuantizeOptions
    max_lost_points: float
    threads: int


def choose_quantization(question: Question, progress: Progress | None = None) -> Choice:
    """Tries ways to calibrate, then fp32 for the most sensitive products, until the loss is small enough.

    Args:
        question: The parent, the texts, the data to judge by.
        progress: Told how many of how many candidates have been tried.

    Returns:
        All candidates, the chosen one marked: the first whose loss is small enough with the smallest move of logits,
        or, where none holds, the one that loses least.
    """
    parent = predict_logits(OnnxRuntime(question.source, threads=question.threads), question.valid.texts)
    tried: list[Candidate] = []
    for done, calibration in enumerate(CALIBRATIONS):
        tried.append(_candidate(question, replace(question.options, calibration=calibration), parent))
        if progress:
            progress(done + 1, len(CALIBRATIONS))
    best, sensitivity = _best(tried, question.max_lost_points), dict[str, float]()
    if best.lost_points > question.max_lost_points:
        sensitivity = _sensitivity(question, best.options)
        for kept in range(1, len(sensitivity) // 2 + 1):
            keep = tuple(list(sensitivity)[:kept])
            tried.append(_candidate(question, replace(best.options, keep=keep), parent))
            if progress:
                progress(kept, len(sensitivity) // 2)
            if tried[-1].lost_points <= question.max_lost_points:
                break
        best = _best(tried, question.max_lost_points)
    marked = [replace(candidate, chosen=candidate is best) for candidate in tried]
    return Choice(candidates=marked, sensitivity=sensitivity, holds=best.lost_points <= question.max_lost_points)


def _best(tried: Sequence[Candidate], max_lost_points: float) -> Candidate:
    def rank(candidate: Candidate) -> tuple[float, float]:
        return max(candidate.lost_points, max_lost_points), candidate.mean_logit_difference

    return min(tried, key=rank)


def _candidate(question: Question, options: QuantizeOptions, parent: Logits) -> Candidate:
    found = _logits(question, options, question.valid.texts)
    labels = np.asarray(question.valid.labels)
    right, right_before = found.argmax(-1) == labels, parent.argmax(-1) == labels
    return Candidate(
        options=options,
        accuracy=float(right.mean()),
        retention=paired_ratio(right, right_before),
        lost_points=100 * float(right_before.mean() - right.mean()),
        label_flips=int((found.argmax(-1) != parent.argmax(-1)).sum()),
        mean_logit_difference=float(np.abs(found - parent).max(axis=-1).mean()),
    )


def _logits(question: Question, options: QuantizeOptions, texts: Sequence[str]) -> Logits:
    """Answers of the parent quantized in some way; no folder is kept."""
    with tempfile.TemporaryDirectory(prefix="hasten-") as name:
        folder = Path(name)
        copy_configuration(question.source, folder)
        quantize_graph(question.source, folder / "model.onnx", options, question.texts)
        draft = Variant(path=folder, manifest=question.source.manifest)
        return predict_logits(OnnxRuntime(draft, threads=question.threads), texts)


def _sensitivity(question: Question, options: QuantizeOptions) -> dict[str, float]:
    """How far logits move when one product alone is quantized, worst first."""
    every = products(question.source)
    texts = question.valid.texts[:SENSITIVITY_TEXTS]
    parent = predict_logits(OnnxRuntime(question.source, threads=question.threads), texts)
    moves: dict[str, float] = {}
    for product in every:
        rest = tuple(name for name in every if name != product)
        found = _logits(question, replace(options, keep=rest, embeddings=False), texts)
        moves[product] = float(np.abs(found - parent).max(axis=-1).mean())
    return dict(sorted(moves.items(), key=lambda move: -move[1]))
