"""Values of an ONNX graph that is rewritten: what an operator reads, and constants to add."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


def optional_input(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node; None where it has none there.

    Args:
        node: The node.
        index: From 0.

    Returns:
        The value.
    """
    return node.inputs[index] if len(node.inputs) > index else None


def add_constant(graph: ir.Graph, name: str, content: Any) -> ir.Value:
    """Adds an initializer to a graph.

    Args:
        graph: The graph.
        name: Unlike that of any other value.
        content: An array.

    Returns:
        The value that bears it.
    """
    tensor = ir.tensor(np.asarray(content, order="C"), name=name)
    value = ir.Value(name=name, shape=ir.Shape(np.shape(content)), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
