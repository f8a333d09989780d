"""Export: a torch variant becomes a fused ONNX graph, proven equal on padded batches before it is kept.

PyTorch's `dynamo` exporter traces the model with symbolic batch and sequence (its older tracer bakes a wrong attention
mask into transformers 5 models, which only a padded batch shows); `hasten.onnx_fusion` merges its operators. Nodes are
named after the module they come from, so that a profile says where the time goes. Sources, stack traces and paths,
which the exporter records in the graph, are removed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hasten.errors import ArtifactError, MissingExtraError, ParityError
from hasten.golden import GOLDEN_TEXTS, finish
from hasten.measurement import library_versions
from hasten.runtime import Runtime, open_runtime, predict_logits
from hasten.torch_runtime import load_torch_model, model_inputs
from hasten.variant import Manifest, StepRecord, Variant, building, copy_configuration

OPSET = 18
SCOPES = "pkg.torch.onnx.name_scopes"
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
        facts |= _prove(source, draft, manifest, options, texts)
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
    import onnx

    from hasten.onnx_fusion import fuse, require_fused

    model = load_torch_model(source, attention="eager")
    graph = _traced(model)
    _rename_nodes(graph)
    fused = fuse(graph, source.manifest.max_tokens)
    _strip_metadata(fused)
    onnx.save_model(fused, path)
    return require_fused(fused, model.config)


def _traced(model: Any) -> Any:
    """The ONNX ModelProto with symbolic batch and sequence."""
    import torch

    names = model_inputs(model)
    example = {name: torch.ones((2, 8), dtype=torch.int64) for name in names}
    example["attention_mask"][0, 5:] = 0
    axes = {name: {0: "batch", 1: "sequence"} for name in names}
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                model, (), kwargs=example, dynamo=True, dynamic_shapes=axes, input_names=list(names),
                output_names=["logits"], opset_version=OPSET, verbose=False,
            )  # fmt: skip
    except ImportError as error:
        raise MissingExtraError("onnx with onnxscript", "optimize") from error
    except Exception as error:  # the exporter raises many kinds
        kind = model.config.model_type
        raise ArtifactError(f"PyTorch's exporter cannot trace the architecture {kind!r}: {error}") from error
    if program is None:
        raise ArtifactError(f"PyTorch's exporter gave no graph for the architecture {model.config.model_type!r}")
    return program.model_proto


@contextmanager
def _quiet_exporter() -> Generator[None]:
    """Silences what the exporter says of itself: missing torchvision, its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _rename_nodes(graph: Any) -> None:
    """Names each node `<module path>/<its name>`, from the scopes the exporter recorded."""
    from ast import literal_eval

    for node in graph.graph.node:
        recorded = {entry.key: entry.value for entry in node.metadata_props}.get(SCOPES, "['', '']")
        modules = [scope for scope in literal_eval(recorded)[:-1] if scope and not scope.startswith("_")]
        node.name = f"{modules[-1] if modules else ''}/{node.name}"


def _strip_metadata(graph: Any) -> None:
    holders = [graph, graph.graph, *graph.graph.node, *graph.graph.initializer, *graph.graph.value_info]
    holders += [*graph.graph.input, *graph.graph.output, *graph.functions]
    for holder in holders:
        del holder.metadata_props[:]
    for node in graph.graph.node:
        node.doc_string = ""


def _prove(
    source: Variant, draft: Path, manifest: Manifest, options: ExportOptions, texts: Sequence[str]
) -> dict[str, Any]:
    """Compares logits and labels on padded, mixed-length batches."""
    exported = open_runtime(Variant(path=draft, manifest=manifest))
    every = [*GOLDEN_TEXTS, *texts]
    expected, got = (_mixed_logits(r, every, options.parity_batch) for r in (open_runtime(source), exported))
    difference = float(np.abs(expected - got).max())
    flips = int((expected.argmax(-1) != got.argmax(-1)).sum())
    if not difference <= options.tolerance:
        raise ParityError(
            f"{manifest.name}: a logit differs by {difference:.2g} from PyTorch on padded batches "
            f"(at most {options.tolerance:g}); the export of {manifest.architecture!r} is not faithful"
        )
    return {"parity": {"max_logit_difference": difference, "label_flips": flips, "texts": len(every)}}


def _mixed_logits(runtime: Runtime, texts: Sequence[str], batch: int) -> Any:
    """Logits in the given order, batches unsorted, so that rows of very different lengths are padded together."""
    encodings = runtime.encode(texts)
    parts = [runtime.infer(encodings[start : start + batch]) for start in range(0, len(texts), batch)]
    return np.concatenate([parts[0], *parts[1:], *(predict_logits(runtime, texts[:1]),)])
