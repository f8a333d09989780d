"""Fidelity: how far a variant's answers are from those of the variant it was made from, on real texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hasten.cores import available_cores
from hasten.errors import ArtifactError, DataError, ParityError
from hasten.golden import GOLDEN_TEXTS
from hasten.invariance import batch_invariance
from hasten.runtime import Logits, Runtime, open_runtime, predict_logits
from hasten.tokenization import Encoding
from hasten.variant import Format, Variant

MOST_PAIRS = 8 * 2048**2  # of tokens of a row, over the rows of a padded batch


def prove_parity(
    source: Variant, exported: Variant, texts: Sequence[str], *, tolerance: float, batch: int
) -> dict[str, Any]:
    """Compares logits and labels on padded batches of mixed lengths, and alone.

    Args:
        source: What was exported.
        exported: The result, which need not be sealed yet.
        texts: Real texts, next to the golden ones.
        tolerance: Largest difference allowed of a logit.
        batch: Texts in each padded batch.

    Returns:
        The fact `parity`: largest difference, label flips, texts.

    Raises:
        ParityError: A logit differs by more.
    """
    every = [*GOLDEN_TEXTS, *texts]
    expected, got = (_mixed_logits(open_runtime(v), every, batch) for v in (source, exported))
    difference = float(np.abs(expected - got).max())
    flips = int((expected.argmax(-1) != got.argmax(-1)).sum())
    if not difference <= tolerance:
        raise ParityError(
            f"{exported.name}: a logit differs by {difference:.2g} from PyTorch, alone or on padded batches "
            f"(at most {tolerance:g}); the export of {exported.manifest.architecture!r} is not faithful"
        )
    return {"parity": {"max_logit_difference": difference, "label_flips": flips, "texts": len(every)}}


def _mixed_logits(runtime: Runtime, texts: Sequence[str], batch: int) -> Any:
    """Logits in the given order, batches unsorted, so that rows of very different lengths are padded together.

    Then those of each text alone. Attention's memory grows with the square of a batch's length, so long texts have
    fewer mates.
    """
    batches: list[list[Encoding]] = [[]]
    for encoding in runtime.encode(texts):
        longest = max(map(len, (*batches[-1], encoding)))
        if len(batches[-1]) == batch or (len(batches[-1]) + 1) * longest**2 > MOST_PAIRS:
            batches.append([])
        batches[-1].append(encoding)
    parts = [runtime.infer(rows) for rows in batches if rows]
    return np.concatenate([*parts, predict_logits(runtime, texts)])


def check_quantizable(source: Variant, wanted: Format, texts: Sequence[str]) -> None:
    """Refuses what cannot be quantized by a step.

    Args:
        source: What shall be quantized.
        wanted: The format that the step takes.
        texts: What it shall be calibrated and compared on.

    Raises:
        ArtifactError: The source is of another format, or not fp32.
        DataError: There are no texts, or only empty ones.
    """
    if (source.manifest.format, source.manifest.precision) != (wanted, "fp32"):
        kind, name = f"{source.manifest.format} {source.manifest.precision}", {"onnx": "ONNX", "openvino": "OpenVINO"}
        raise ArtifactError(f"{source.path}: a {kind} variant; only a fp32 {name[wanted]} variant can be quantized")
    if not any(text.strip() for text in texts):
        raise DataError(
            f"quantization calibrates and measures its loss on real texts; all {len(texts)} given are empty"
        )


def finite_logits(variant: Variant, texts: Sequence[str]) -> Logits:
    """Logits of texts one at a time; shape [texts, labels].

    Args:
        variant: What to run.
        texts: The texts.

    Returns:
        The logits.

    Raises:
        ParityError: The model answers NaN or infinity.
    """
    logits = predict_logits(open_runtime(variant, threads=_threads()), texts)
    if not np.isfinite(logits).all():
        raise ParityError(f"{variant.name}: the model answers NaN or infinity on real texts; its weights are broken")
    return logits


def measure_changes(
    before: Logits, quantized: Variant, texts: Sequence[str], mixed: Sequence[str] | None = None
) -> dict[str, Any]:
    """What quantization changed, and whether company changes answers.

    Args:
        before: The parent's logits of the texts; shape [texts, labels].
        quantized: The result, which need not be sealed yet.
        texts: Real texts.
        mixed: Real texts to put into each other's company; `texts` if None.

    Returns:
        The facts `against_fp32` (label flips, mean and largest difference of a logit) and `batch_invariance`.

    Raises:
        ParityError: The INT8 model answers NaN or infinity.
    """
    after = finite_logits(quantized, texts)
    difference = np.abs(before - after).max(axis=-1)
    company = batch_invariance(open_runtime(quantized, threads=_threads()), texts if mixed is None else mixed)
    return {
        "against_fp32": {
            "texts": len(texts),
            "label_flips": int((before.argmax(-1) != after.argmax(-1)).sum()),
            "mean_logit_difference": float(difference.mean()),
            "max_logit_difference": float(difference.max()),
        },
        "batch_invariance": asdict(company),
    }


def _threads() -> int:
    return max(1, int(available_cores()))
