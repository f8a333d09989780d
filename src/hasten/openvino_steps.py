"""The road through OpenVINO: a torch variant becomes an OpenVINO model, that one INT8, and either bfloat16.

OpenVINO has graph transformations and kernels of its own, which are at home on Intel's CPUs, so the graph is handed
over as it was traced, but for shapes that can be written down as constants. It is quantized by NNCF, statically, with
the scales of outliers moved into the weights and biases corrected. bfloat16 changes no file of the graph: OpenVINO
rounds as it loads and runs it. Folders are laid out as optimum-intel's are (`openvino_model.xml` and `.bin`): its
classes open them.

Source: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
and Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.2; both as
NNCF carries them out for transformers.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.errors import ArtifactError, MissingExtraError, UsageError
from hasten.fidelity import check_calibration, check_source, finish_measured, finite_logits, prove_parity
from hasten.golden import GOLDEN_TEXTS, finish
from hasten.measurement import library_versions
from hasten.openvino_runtime import has_bfloat16, load_openvino
from hasten.tokenization import TextEncoder, pad_token_id, padded
from hasten.torch_runtime import load_torch_model
from hasten.tracing import OPSET, trace
from hasten.variant import IN_BFLOAT16, WEIGHTS, Precision, StepRecord, Variant, building, copy_configuration

GRAPH = "openvino_model.xml"
TOLERANCE = 1e-4
PARITY_BATCH = 8
CALIBRATION_TEXTS = 200
VERSIONED = ("torch", "transformers", "onnx", "onnxscript", "openvino", "nncf")


def export_openvino(
    source: Variant, out: Path, *, name: str = "openvino-fp32", texts: Sequence[str] = GOLDEN_TEXTS
) -> Variant:
    """Exports a torch variant to OpenVINO.

    Args:
        source: A torch variant.
        out: The folder to make.
        name: The new variant's name.
        texts: Real texts to prove parity on, next to the golden ones.

    Returns:
        The OpenVINO variant. Its step's facts hold the parity.

    Raises:
        ArtifactError: The source is no torch variant, or the exporter cannot trace it.
        ParityError: A logit differs from PyTorch's by more than 1e-4.
        MissingExtraError: torch, onnx or openvino is not installed.
    """
    openvino = load_openvino()
    if source.manifest.format != "torch":
        raise ArtifactError(f"{source.path}: format is {source.manifest.format}; only torch variants can be exported")
    with building(out) as draft:
        copy_configuration(source, draft)
        model = openvino.Core().read_model(_traced(source).SerializeToString())
        openvino.save_model(model, draft / GRAPH, compress_to_fp16=False)
        manifest = replace(source.manifest, name=name, format="openvino", step=_record("export", source))
        exported = Variant(path=draft, manifest=manifest)
        facts = prove_parity(source, exported, texts, tolerance=TOLERANCE, batch=PARITY_BATCH)
        sealed = finish(draft, replace(manifest, step=_record("export", source, facts)))
    return Variant(path=out.resolve(), manifest=sealed)


def quantize_openvino(
    source: Variant,
    out: Path,
    *,
    name: str = "openvino-int8",
    texts: Sequence[str],
    mixed: Sequence[str] | None = None,
) -> Variant:
    """Quantizes a fp32 OpenVINO variant.

    Args:
        source: A fp32 OpenVINO variant.
        out: The folder to make.
        name: The new variant's name.
        texts: Real texts of the training side, at least one that is not empty, to calibrate on and to measure the
            change on.
        mixed: Real texts to prove batch invariance on; `texts` if None.

    Returns:
        The INT8 variant. Its step's facts hold the label flips and logit differences against the source, and whether
        texts get the same logits alone and in batches.

    Raises:
        ArtifactError: The source is no fp32 OpenVINO variant.
        DataError: There are no texts, or only empty ones, or they cannot be calibrated on.
        ParityError: The source or the INT8 model answers NaN.
        MissingExtraError: openvino or nncf is not installed.
    """
    check_source(source, "openvino", texts)
    check_calibration(source, texts[:CALIBRATION_TEXTS])
    before = finite_logits(source, texts)
    with building(out) as draft:
        copy_configuration(source, draft)
        _quantize_graph(source, draft / GRAPH, texts[:CALIBRATION_TEXTS])
        step = _record("quantize", source)
        manifest = replace(source.manifest, name=name, precision="int8", plan=None, step=step)
        sealed = finish_measured(Variant(path=draft, manifest=manifest), before, texts, mixed)
    return Variant(path=out.resolve(), manifest=sealed)


def convert_openvino(
    source: Variant, out: Path, *, name: str, texts: Sequence[str], mixed: Sequence[str] | None = None
) -> Variant:
    """Converts an OpenVINO variant to bfloat16: the same graph, run in it wherever it is not in INT8.

    Args:
        source: A fp32 or INT8 OpenVINO variant.
        out: The folder to make.
        name: The new variant's name.
        texts: Real texts of the training side, at least one that is not empty, to measure the change on.
        mixed: Real texts to prove batch invariance on; `texts` if None.

    Returns:
        The variant, of precision `bf16` or `int8+bf16`. Its step's facts hold the label flips and logit differences
        against the source, and whether texts get the same logits alone and in batches.

    Raises:
        ArtifactError: The source is no fp32 or INT8 OpenVINO variant.
        UsageError: OpenVINO does not multiply bfloat16 on this CPU.
        DataError: There are no texts, or only empty ones.
        ParityError: The source or the result answers NaN.
        MissingExtraError: openvino is not installed.
    """
    lowered: dict[Precision, Precision] = {plain: low for low, plain in IN_BFLOAT16.items()}
    check_source(source, "openvino", texts, precisions=tuple(lowered), done="converted to bfloat16")
    if not has_bfloat16():
        raise UsageError(f"OpenVINO does not multiply bfloat16 on this CPU; use {source.path} as it is")
    before = finite_logits(source, texts)
    with building(out) as draft:
        copy_configuration(source, draft)
        for file in WEIGHTS["openvino"]:
            shutil.copyfile(source.path / file, draft / file)
        precision, step = lowered[source.manifest.precision], _record("convert", source)
        manifest = replace(source.manifest, name=name, precision=precision, plan=None, step=step)
        sealed = finish_measured(Variant(path=draft, manifest=manifest), before, texts, mixed)
    return Variant(path=out.resolve(), manifest=sealed)


def _traced(source: Variant) -> Any:
    graph = trace(load_torch_model(source, attention="eager"))
    from hasten.reshapes import fix_reshapes  # what it needs, tracing has asked for

    return fix_reshapes(graph)


def _record(step: str, source: Variant, facts: dict[str, Any] | None = None) -> StepRecord:
    options = {
        "export": {"tolerance": TOLERANCE, "opset": OPSET},
        "quantize": {"calibration_texts": CALIBRATION_TEXTS},
        "convert": {},
    }
    versions = library_versions(VERSIONED)
    return StepRecord(name=step, parent=source.digest, options=options[step], versions=versions, facts=facts or {})


def _quantize_graph(source: Variant, path: Path, texts: Sequence[str]) -> None:
    openvino = load_openvino()
    model = openvino.Core().read_model(source.path / GRAPH)
    names, pad_id = [node.any_name for node in model.inputs], pad_token_id(source)
    batches = [padded([encoding], pad_id) for encoding in TextEncoder(source)(texts)]
    feeds = [{name: batch[name] for name in names} for batch in batches]
    with _quiet_nncf() as nncf:
        quantized = nncf.quantize(
            model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds)
        )
    openvino.save_model(quantized, path, compress_to_fp16=False)


@contextmanager
def _quiet_nncf() -> Generator[Any]:
    """The module `nncf`, with its usage reports off and its bars off the terminal."""
    with _without_reports():
        try:
            import nncf
        except ImportError as error:
            raise MissingExtraError("nncf", "openvino") from error
    nncf.set_log_level(logging.ERROR)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield nncf


@contextmanager
def _without_reports() -> Generator[None]:
    """What is imported here first neither reports usage over the network nor writes an identity to HOME."""
    before = os.environ.get("CI")
    os.environ |= {"CI": "true", "NNCF_CI": "1"}  # what its packages look for
    try:
        yield
    finally:
        os.environ.pop("CI")
        if before is not None:
            os.environ["CI"] = before
