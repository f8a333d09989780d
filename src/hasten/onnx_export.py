"""Export: a torch variant becomes a fused ONNX graph, proven equal on padded batches before it is kept.

`hasten.tracing` gives the graph, `hasten.onnx_fusion` merges its operators. Nodes are named after the module they come
from, so that a profile says where the time goes. Sources, stack traces and paths, which the exporter records in the
graph, are removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hasten.errors import ArtifactError, MissingExtraError
from hasten.fidelity import prove_parity
from hasten.golden import GOLDEN_TEXTS, finish
from hasten.measurement import library_versions
from hasten.torch_runtime import load_torch_model
from hasten.tracing import OPSET, trace
from hasten.variant import StepRecord, Variant, building, copy_configuration

VERSIONED = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How to export.

    Attributes:
        tolerance: Largest difference allowed between a logit in PyTorch and in onnxruntime.
        parity_batch: Texts in each padded batch that is compared.
    """

    tolerance: float = 1e-4
    parity_batch: int = 8


def export(
    source: Variant,
    out: Path,
    options: ExportOptions | None = None,
    *,
    name: str = "onnx-fp32",
    texts: Sequence[str] = GOLDEN_TEXTS,
) -> Variant:
    """Exports a torch variant to ONNX.

    Args:
        source: A torch variant.
        out: The folder to make.
        options: How; the defaults if None.
        name: The new variant's name.
        texts: Real texts to prove parity on, next to the golden ones.

    Returns:
        The ONNX variant. Its step's facts hold the parity and the fused operators by count.

    Raises:
        ArtifactError: The source is no torch variant, or the exporter cannot trace it.
        ParityError: A logit differs by more than the tolerance.
        MissingExtraError: torch, onnx or onnxscript is not installed.
    """
    options = options or ExportOptions()
    if source.manifest.format != "torch":
        raise ArtifactError(f"{source.path}: format is {source.manifest.format}; only torch variants can be exported")
    with building(out) as draft:
        copy_configuration(source, draft)
        facts = _write_graph(source, draft / "model.onnx")
        manifest = replace(source.manifest, name=name, format="onnx", step=_record(source, options, {}))
        exported = Variant(path=draft, manifest=manifest)
        facts |= prove_parity(source, exported, texts, tolerance=options.tolerance, batch=options.parity_batch)
        sealed = finish(draft, replace(manifest, step=_record(source, options, facts)))
    return Variant(path=out.resolve(), manifest=sealed)


def _record(source: Variant, options: ExportOptions, facts: dict[str, Any]) -> StepRecord:
    return StepRecord(
        name="export",
        parent=source.digest,
        options=asdict(options) | {"opset": OPSET},
        versions=library_versions(VERSIONED),
        facts=facts,
    )


def _write_graph(source: Variant, path: Path) -> dict[str, Any]:
    """Writes the fused graph; what was fused."""
    try:
        import onnx

        from hasten.onnx_fusion import fuse, require_fused
    except ImportError as error:
        raise MissingExtraError("onnx with onnxscript", "optimize") from error
    model = load_torch_model(source, attention="eager")
    graph = trace(model)
    fused = fuse(graph, source.manifest.max_tokens)
    _strip_metadata(fused)
    onnx.save_model(fused, path)
    return require_fused(fused, model.config)


def _strip_metadata(graph: Any) -> None:
    holders = [graph, graph.graph, *graph.graph.node, *graph.graph.initializer, *graph.graph.value_info]
    holders += [*graph.graph.input, *graph.graph.output, *graph.functions]
    for holder in holders:
        del holder.metadata_props[:]
    for node in graph.graph.node:
        node.doc_string = ""
