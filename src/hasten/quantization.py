"""Quantization: a fp32 ONNX variant becomes INT8, with what it changes measured on real texts.

Weights of the matrix products become 8-bit integers with one scale an output channel. Activations become 8-bit integers
too, and there are two ways to come by their scale:

- *static*: from the ranges that calibration texts give, once. A text's logits do not depend on its batch-mates, which
  is measured before the variant is marked as batch-invariant.
- *dynamic*: from each batch as it comes. It needs no calibration, but a text's logits move with its batch-mates, so the
  variant is served one text at a time.

Products keep fp32 outputs, the residual path is never rounded, and the head stays in fp32: it is one row a text.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2, the affine scheme; carried out by onnxruntime's `quantize_static` and `quantize_dynamic`.
"""

from __future__ import annotations

import io
import logging
import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from hasten.errors import ArtifactError, MissingExtraError, UsageError
from hasten.fidelity import check_calibration, check_source, finish_measured, finite_logits
from hasten.measurement import library_versions, this_host
from hasten.runtime import OnnxRuntime
from hasten.smoothing import channel_peaks, smooth, smoothed_freely
from hasten.variant import StepRecord, Variant, building, copy_configuration

FLOAT_TENSOR = 1
PRODUCT, PACKED, LOOKUP = "MatMul", "Attention", "Gather"
VERSIONED = ("onnx", "onnxruntime")
COPIES, COPIES_ELSEWHERE = 4, 2  # of the graph, at the same time and at most, beside it and where temporary files are
SUMS_IN_32_BITS = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}

Method = Literal["static", "dynamic"]
Calibration = Literal["minmax", "percentile", "entropy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How to quantize.

    Attributes:
        method: Where the scales of activations come from: `static`, from calibration, or `dynamic`, from each batch.
        calibration: Which range of the calibration texts is kept: all of it (`minmax`), its 99.999 % (`percentile`), or
            that which loses the least information (`entropy`). Not used by the dynamic method.
        calibration_texts: Texts to calibrate on, at most; at least 1.
        per_channel: One weight scale an output channel instead of one a matrix.
        reduce_range: 7-bit weights, which cannot saturate the 16-bit sums of CPUs without VNNI; None takes them where
            this CPU is one. With the dynamic method the products inside attentions have 7 bits in any case.
        embeddings: Whether the embedding tables become INT8 too.
        smoothing: How much of the activations' outliers is moved into the weights, 0 (nothing) to 1; see
            `hasten.smoothing`. Not used by the dynamic method.
        smoothed: Names of matrix products that get an operator for it where there must be one; all of them if None.
        keep: Names of matrix products that stay in fp32, with all that share their weights.
    """

    method: Method = "static"
    calibration: Calibration = "minmax"
    calibration_texts: int = 200
    per_channel: bool = True
    reduce_range: bool | None = None
    embeddings: bool = True
    smoothing: float = 0.0
    smoothed: tuple[str, ...] | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UsageError: A value is out of range.
        """
        if not 0 <= self.smoothing <= 1:
            raise UsageError(f"smoothing is a share, 0 to 1, not {self.smoothing}")
        if self.calibration_texts < 1:
            raise UsageError(f"at least 1 text is needed to calibrate on, not {self.calibration_texts}")

    @property
    def reduces_range(self) -> bool:
        """Whether weights get 7 bits, as asked for or as this CPU calls for."""
        return can_saturate() if self.reduce_range is None else self.reduce_range


def can_saturate() -> bool:
    """Whether this CPU sums products of 8-bit integers in 16 bits, where two large ones do not fit."""
    return not SUMS_IN_32_BITS & set(this_host().instructions)


def quantize(
    source: Variant,
    out: Path,
    options: QuantizeOptions | None = None,
    *,
    name: str = "onnx-int8",
    texts: Sequence[str],
    mixed: Sequence[str] | None = None,
) -> Variant:
    """Quantizes an ONNX variant.

    Args:
        source: A fp32 ONNX variant.
        out: The folder to make.
        options: How; the defaults if None.
        name: The new variant's name.
        texts: Real texts of the training side, at least one, to calibrate on and to measure the change on.
        mixed: Real texts to prove batch invariance on; `texts` if None.

    Returns:
        The INT8 variant. Its step's facts hold the label flips and logit differences against the source, and whether
        texts get the same logits alone and in batches.

    Raises:
        ArtifactError: The source is no fp32 ONNX variant, or no product of it can be quantized.
        DataError: There are no texts, or only empty ones, or they cannot be calibrated on.
        ParityError: The source or the INT8 model answers NaN.
        MissingExtraError: onnx is not installed.
    """
    options = options or QuantizeOptions()
    check_source(source, "onnx", texts)
    if options.method == "static":
        check_calibration(source, texts[: options.calibration_texts])
    before = finite_logits(source, texts)
    with building(out) as draft:
        copy_configuration(source, draft)
        quantize_graph(source, draft / "model.onnx", options, texts)
        manifest = replace(source.manifest, name=name, precision="int8", plan=None, step=_record(source, options))
        sealed = finish_measured(Variant(path=draft, manifest=manifest), before, texts, mixed)
    return Variant(path=out.resolve(), manifest=sealed)


def _record(source: Variant, options: QuantizeOptions) -> StepRecord:
    return StepRecord(
        name="quantize",
        parent=source.digest,
        options=asdict(options) | {"reduce_range": options.reduces_range},
        versions=library_versions(VERSIONED),
    )


def products(source: Variant) -> dict[str, str]:
    """Products of activations with weights in an ONNX variant, in their order.

    Args:
        source: The variant.

    Returns:
        Names of the weights, by the product's; products may share weights, as ALBERT's layers do.
    """
    import onnx

    graph = onnx.load_model(source.path / source.weights, load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}
    found = [node for node in graph.node if node.op_type in (PRODUCT, PACKED) and node.input[1] in weights]
    return {node.name: node.input[1] for node in found}


def quantize_graph(
    source: Variant, path: Path, options: QuantizeOptions, texts: Sequence[str], *, ranges: Path | None = None,
    plain: Path | None = None,
) -> None:  # fmt: skip
    """Writes the INT8 graph of a variant.

    Args:
        source: A fp32 ONNX variant.
        path: The file to write.
        options: How.
        texts: Texts to calibrate on.
        ranges: A file to keep the calibrated ranges in and to take them from when it exists.
        plain: A file to keep the graph in as it was just before its products became INT8. Not written by the dynamic
            method.

    Raises:
        ArtifactError: No product is left to quantize, or there is no room to do it in.
        MissingExtraError: onnx is not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise MissingExtraError("onnx", "optimize") from error
    wanted = _wanted(source, options)
    _require_room(source, path.parent)
    common: dict[str, Any] = {
        "per_channel": options.per_channel,
        "reduce_range": options.reduces_range,
        "weight_type": QuantType.QInt8,
    }
    extra: dict[str, Any] = {"DefaultTensorType": FLOAT_TENSOR, "MatMulConstBOnly": True}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _quiet_quantizer():
        graph = Path(folder) / "source.onnx"  # a copy: onnxruntime's quantizer writes beside what it reads
        shutil.copyfile(source.path / source.weights, graph)
        if options.embeddings:
            lookups, graph = graph, Path(folder) / "embeddings.onnx"
            quantize_dynamic(lookups, graph, op_types_to_quantize=[LOOKUP], extra_options=extra, **common)
        if options.method == "dynamic":
            quantize_dynamic(
                graph, path, op_types_to_quantize=[PRODUCT, PACKED], nodes_to_quantize=wanted, extra_options=extra,
                **common,
            )  # fmt: skip
        else:
            reader = _Reader(source, texts[: options.calibration_texts])
            plain = plain or Path(folder) / "plain.onnx"
            onnx.save_model(_with_plain_products(graph, wanted, reader, options), plain)
            _quantize_static(reader, plain, path, options, wanted, extra, ranges)


def smoothed_by_operators(source: Variant) -> set[str]:
    """Names of the products of an ONNX variant whose smoothing takes an operator; that of the others is free."""
    import onnx_ir as ir

    from hasten.packing import unpack

    model = ir.load(source.path / source.weights)
    unpack(model)
    every = products(source)
    return set(every) - smoothed_freely(ir.to_proto(model), list(every))


def _wanted(source: Variant, options: QuantizeOptions) -> list[str]:
    """Names of the products to quantize."""
    weights = products(source)
    kept = {weights[name] for name in options.keep if name in weights}
    if not (wanted := [name for name in weights if weights[name] not in kept]):
        raise ArtifactError(f"{source.path}: no product of activations with weights is left to quantize")
    return wanted


def _require_room(source: Variant, folder: Path) -> None:
    """Refuses a full disk, where onnxruntime's quantizer fails to read what it wrote."""
    for place, copies in ((folder, COPIES), (Path(tempfile.gettempdir()), COPIES_ELSEWHERE)):
        needed = copies * source.size_bytes
        if (free := shutil.disk_usage(place).free) < needed:
            raise ArtifactError(
                f"{place}: {free / 1e6:,.0f} MB are free, and quantizing {source.path} takes {needed / 1e6:,.0f} MB "
                "for a while; make room, or choose another folder by --out or TMPDIR"
            )


def _with_plain_products(graph: Path, wanted: Sequence[str], reader: _Reader, options: QuantizeOptions) -> Any:
    """The graph with its attentions taken apart, and smoothed."""
    import onnx_ir as ir

    from hasten.packing import unpack

    model = ir.load(graph)
    unpack(model)
    plain = ir.to_proto(model)
    if options.smoothing:
        peaks = channel_peaks(plain, wanted, reader.batches)
        smooth(plain, wanted, peaks, options.smoothing, options.smoothed)
    return plain


def _quantize_static(
    reader: _Reader, graph: Path, path: Path, options: QuantizeOptions, wanted: list[str], extra: dict[str, Any],
    ranges: Path | None,
) -> None:  # fmt: skip
    import onnx_ir as ir
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    from hasten.integer_products import use_integer_products

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    quantize_static(
        graph, path, cast("Any", reader), quant_format=QuantFormat.QDQ, op_types_to_quantize=[PRODUCT],
        nodes_to_quantize=wanted, per_channel=options.per_channel, reduce_range=options.reduces_range,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=methods[options.calibration],
        calibration_cache_path=ranges,
        extra_options=extra | {
            "OpTypesToExcludeOutputQuantization": [PRODUCT],
            "CalibStridedMinMax": 1,  # one text at a time; the histograms cannot take several lengths at once
        },
    )  # fmt: skip
    model = ir.load(path)
    use_integer_products(model)
    ir.save(model, path)


class _Reader:
    """Calibration texts as onnxruntime's quantizer reads them: one padded batch of one text after another."""

    def __init__(self, source: Variant, texts: Sequence[str]) -> None:
        runtime = OnnxRuntime(source, threads=1)
        self.batches = [runtime.feed([encoding]) for encoding in runtime.encode(texts)]
        self._next, self._end = 0, len(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, Any] | None:
        if self._next >= self._end:
            return None
        self._next += 1
        return self.batches[self._next - 1]


@contextmanager
def _quiet_quantizer() -> Generator[None]:
    """Keeps the quantizer's advice to pre-process, which the export has done, off the root logger and stdout."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):  # its calibrators print
            yield
    finally:
        logging.disable(previous)
