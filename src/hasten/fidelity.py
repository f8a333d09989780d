"""Fidelity: how far a variant's answers are from those of the variant it was made from, on real texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from hasten.cores import available_cores
from hasten.errors import ArtifactError, DataError, ParityError
from hasten.golden import GOLDEN_TEXTS, finish
from hasten.invariance import batch_invariance
from hasten.runtime import Logits, Runtime, open_runtime, predict_logits
from hasten.tokenization import Encoding, TextEncoder
from hasten.variant import IN_BFLOAT16, Format, Manifest, Precision, Variant

MOST_UNKNOWN = 0.5  # of the tokens that ranges are taken from
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


def check_source(
    source: Variant, wanted: Format, texts: Sequence[str], *, precisions: Sequence[Precision] = ("fp32",),
    done: str = "quantized",
) -> None:  # fmt: skip
    """Refuses what a step that changes answers cannot start from.

    Args:
        source: What the step is given.
        wanted: The format that it takes.
        texts: What it shall be compared on.
        precisions: The precisions that it takes.
        done: What it does with a variant.

    Raises:
        ArtifactError: The source is of another format or precision.
        DataError: There are no texts, or only empty ones.
    """
    if source.manifest.format != wanted or source.manifest.precision not in precisions:
        kind, name = f"{source.manifest.format} {source.manifest.precision}", {"onnx": "ONNX", "openvino": "OpenVINO"}
        taken = f"{' or '.join(precisions)} {name[wanted]}"
        raise ArtifactError(f"{source.path}: a {kind} variant; only a {taken} variant can be {done}")
    if not any(text.strip() for text in texts):
        raise DataError(f"a variant is {done} with its loss measured on real texts; all {len(texts)} given are empty")


def check_calibration(source: Variant, texts: Sequence[str]) -> None:
    """Refuses texts that say nothing of the ranges that a model's activations will take.

    Args:
        source: What is to be quantized statically.
        texts: What it shall be calibrated on.

    Raises:
        DataError: There is but one text, or more than half of the tokens are unknown to the tokenizer.
    """
    if len(set(texts)) == 1:
        raise DataError(
            f"static quantization takes the ranges of activations from the texts given, and all {len(texts)} are the "
            "same text; give some hundred such as the model will be asked about, or quantize dynamically"
        )
    if (unknown := TextEncoder(source).unknown_share(texts)) > MOST_UNKNOWN:
        raise DataError(
            f"{unknown:.0%} of the tokens to calibrate on are unknown to the tokenizer of {source.path}; give texts in "
            "the script and language of the model, or quantize dynamically"
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


def finish_measured(
    made: Variant, before: Logits, texts: Sequence[str], mixed: Sequence[str] | None = None
) -> Manifest:
    """Finishes a draft of lower precision than its parent: what that changed goes into its step's facts.

    Args:
        made: The draft, complete but for `golden.json` and `variant.json`.
        before: The parent's logits of the texts; shape [texts, labels].
        texts: Real texts.
        mixed: Real texts to put into each other's company; `texts` if None.

    Returns:
        The manifest as written. The facts are `against_fp32` or `against_int8`, by the parent (label flips, mean and
        largest difference of a logit), and `batch_invariance`.

    Raises:
        ParityError: The draft answers NaN or infinity.
    """
    changes = _changes(before, made, texts)
    company = batch_invariance(open_runtime(made, threads=_threads()), texts if mixed is None else mixed)
    step = replace(made.manifest.step, facts=changes | {"batch_invariance": asdict(company)})
    return finish(made.path, replace(made.manifest, batch_invariant=company.holds, step=step))


def _changes(before: Logits, made: Variant, texts: Sequence[str]) -> dict[str, Any]:
    after, parent = finite_logits(made, texts), IN_BFLOAT16.get(made.manifest.precision, "fp32")
    difference = np.abs(before - after).max(axis=-1)
    return {
        f"against_{parent}": {
            "texts": len(texts),
            "label_flips": int((before.argmax(-1) != after.argmax(-1)).sum()),
            "mean_logit_difference": float(difference.mean()),
            "max_logit_difference": float(difference.max()),
        }
    }


def _threads() -> int:
    return max(1, int(available_cores()))
