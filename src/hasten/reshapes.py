"""Reshapes: shapes that a traced graph computes at every inference, written down as constants.

The exporter writes a view as `Reshape` to a concatenation of sizes. A runtime cannot tell from that how many heads
there are, and infers the shape again for each input of another length. The exporter also says what the shape comes to,
which is enough: most sizes are constant or those of the input.

Source: ONNX operator specification, `Reshape`, on 0 (the size of the input at the same place) and -1 (what is left).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from hasten.graph_values import add_constant

KEPT, LEFT = 0, -1


def fix_reshapes(graph: Any) -> Any:
    """Gives each reshape a constant shape, where at most one of its sizes is neither constant nor kept.

    Args:
        graph: A traced ONNX `ModelProto`, with the shapes of its tensors.

    Returns:
        The rewritten graph, without what computed the shapes.
    """
    model = ir.from_proto(graph)
    for node in model.graph:
        given, result = node.inputs[:1], node.outputs[0]
        if node.op_type == "Reshape" and given[0] is not None and (sizes := _sizes(given[0], result)) is not None:
            constant = add_constant(model.graph, f"{node.name}/shape", np.array(sizes, np.int64))
            node.replace_input_with(1, constant)
            node.attributes.pop("allowzero", None)
    passes.RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def _sizes(given: ir.Value, result: ir.Value) -> list[int] | None:
    """What the shape input would be; None where that cannot be told, or where a size is truly 0."""
    if given.shape is None or result.shape is None:
        return None
    before = dict(enumerate(given.shape))
    sizes = [_size(before.get(place), size) for place, size in enumerate(result.shape)]
    return sizes if sizes.count(LEFT) <= 1 and 0 not in result.shape else None


def _size(before: int | ir.SymbolicDim | None, size: int | ir.SymbolicDim) -> int:
    if isinstance(size, int):
        return size
    return KEPT if size.value is not None and size == before else LEFT
