"""Quantization: a fp32 ONNX variant becomes INT8, with the loss measured.

Weights of the matrix products become 8-bit integers; activations are quantized as they are met (dynamic), with one
scale for the whole batch. A text's logits therefore move with its batch-mates: the variant is marked as not
batch-invariant, and is served one text at a time.

Source: onnxruntime's guide "Quantize ONNX models", dynamic quantization; the affine scheme of Jacob et al. 2018.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hasten.errors import ArtifactError, DataError, MissingExtraError
from hasten.measurement import library_versions
from hasten.runtime import finish, open_runtime, predict_logits
from hasten.variant import StepRecord, Variant, building, copy_configuration

FLOAT_TENSOR = 1
QUANTIZED_OPERATORS = ("MatMul", "Gemm", "Gather")
VERSIONED = ("onnx", "onnxruntime")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How to quantize.

    Attributes:
        per_channel: One weight scale an output channel instead of one a matrix.
        reduce_range: 7-bit weights, which cannot saturate the 16-bit sums of CPUs without VNNI.
        embeddings: Whether the embedding tables become INT8 too.
    """

    per_channel: bool = True
    reduce_range: bool = False
    embeddings: bool = True


def quantize(
    source: Variant, out: Path, options: QuantizeOptions | None = None, *, name: str = "onnx-int8", texts: Sequence[str]
) -> Variant:
    """Quantizes an ONNX variant.

    Args:
        source: A fp32 ONNX variant.
        out: The folder to make.
        options: How; the defaults if None.
        name: The new variant's name.
        texts: Real texts, at least one, on which the change of the answers is measured.

    Returns:
        The INT8 variant. Its step's facts hold the label flips and logit differences against the source.

    Raises:
        ArtifactError: The source is no fp32 ONNX variant.
        DataError: There are no texts.
        ParityError: The INT8 model answers NaN.
        MissingExtraError: onnx is not installed.
    """
    options = options or QuantizeOptions()
    if (source.manifest.format, source.manifest.precision) != ("onnx", "fp32"):
        kind = f"{source.manifest.format} {source.manifest.precision}"
        raise ArtifactError(f"{source.path}: a {kind} variant; only a fp32 ONNX variant can be quantized")
    if not texts:
        raise DataError("quantization measures its loss on real texts; none were given")
    with building(out) as draft:
        copy_configuration(source, draft)
        _quantize_graph(source, draft / "model.onnx", options)
        manifest = replace(
            source.manifest, name=name, precision="int8", batch_invariant=False, step=_record(source, options, {})
        )
        facts = _changes(source, Variant(path=draft, manifest=manifest), texts)
        sealed = finish(draft, replace(manifest, step=_record(source, options, facts)))
    return Variant(path=out.resolve(), manifest=sealed)


def _record(source: Variant, options: QuantizeOptions, facts: dict[str, Any]) -> StepRecord:
    return StepRecord(
        name="quantize",
        parent=source.digest,
        options=asdict(options),
        versions=library_versions(VERSIONED),
        facts=facts,
    )


def _quantize_graph(source: Variant, path: Path, options: QuantizeOptions) -> None:
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise MissingExtraError("onnx", "optimize") from error
    operators = [kind for kind in QUANTIZED_OPERATORS if kind != "Gather" or options.embeddings]
    with _quiet_quantizer():
        quantize_dynamic(
            source.path / "model.onnx",
            path,
            op_types_to_quantize=operators,
            per_channel=options.per_channel,
            reduce_range=options.reduce_range,
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": FLOAT_TENSOR},
        )


@contextmanager
def _quiet_quantizer() -> Generator[None]:
    """Keeps the quantizer's advice to pre-process, which the export has done, off the root logger."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def _changes(source: Variant, quantized: Variant, texts: Sequence[str]) -> dict[str, Any]:
    before, after = (predict_logits(open_runtime(variant), texts) for variant in (source, quantized))
    difference = np.abs(before - after).max(axis=-1)
    flips = int((before.argmax(-1) != after.argmax(-1)).sum())
    return {
        "against_fp32": {
            "texts": len(texts),
            "label_flips": flips,
            "mean_logit_difference": float(difference.mean()),
            "max_logit_difference": float(difference.max()),
        }
    }
