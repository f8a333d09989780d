"""Tracing: a PyTorch classifier as an ONNX graph with symbolic batch and sequence, not yet optimised.

PyTorch's `dynamo` exporter does it: its older tracer bakes a wrong attention mask into transformers 5 models, which
only a padded batch shows.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from hasten.errors import ArtifactError, MissingExtraError
from hasten.torch_runtime import model_inputs

OPSET = 18
SCOPES = "pkg.torch.onnx.name_scopes"


def trace(model: Any) -> Any:
    """Traces a model.

    Args:
        model: A transformers classifier, loaded with the attention `eager`: the others leave more nodes.

    Returns:
        The ONNX `ModelProto`; inputs named as transformers names them, output `logits`, batch and sequence symbolic,
        nodes named `<module path>/<name>`.

    Raises:
        ArtifactError: The exporter cannot trace the architecture.
        MissingExtraError: onnx or onnxscript is not installed.
    """
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
    graph = program.model_proto
    _rename_nodes(graph)
    return graph


def _rename_nodes(graph: Any) -> None:
    """Names each node `<module path>/<its name>`, from the scopes the exporter recorded."""
    from ast import literal_eval

    for node in graph.graph.node:
        recorded = {entry.key: entry.value for entry in node.metadata_props}.get(SCOPES, "['', '']")
        modules = [scope for scope in literal_eval(recorded)[:-1] if scope and not scope.startswith("_")]
        node.name = f"{modules[-1] if modules else ''}/{node.name}"


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
