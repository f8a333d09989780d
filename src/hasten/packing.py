"""Packing: the product for query, key and value goes into the attention operator, and comes out of it again.

`Attention` multiplies head by head and writes each part where the attention reads it. That saves the split and three
transpositions which `MultiHeadAttention` needs after an ordinary product. Its INT8 form, `QAttention`, does the same
with an integer product. What quantizes or rescales products wants an ordinary one, and takes the graph unpacked.

Source: onnxruntime, "Contrib Operators": `com.microsoft.Attention`, `MultiHeadAttention`, `QAttention`,
`MatMulIntegerToFloat`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from hasten.graph_values import optional_input

CONTRIB = "com.microsoft"
UNPACKED, PACKED, INTEGER_PACKED = "MultiHeadAttention", "Attention", "QAttention"
PRODUCT, INTEGER_PRODUCT = "MatMul", "MatMulIntegerToFloat"
BIAS, PADDING_MASK, POSITION_BIAS = 3, 4, 5  # inputs of MultiHeadAttention
PARTS = 3

Inputs = Sequence[ir.Value | None]


def pack(model: ir.Model) -> None:
    """Makes one operator of each attention and the product that it alone reads, in place.

    The operator bears the product's name. Attentions stay as they are where the three parts are not those of one
    product in equal widths, where there is no bias, and where there is a position bias, which `QAttention` does not
    take.

    Args:
        model: A fused encoder.
    """
    for attention in [node for node in model.graph if node.op_type == UNPACKED]:
        split = _split_before(attention)
        product = split.inputs[0].producer() if split is not None and split.inputs[0] is not None else None
        if split is None or product is None or product.op_type not in (PRODUCT, INTEGER_PRODUCT):
            continue
        inputs = _packed_inputs(product, attention)
        if inputs is not None:
            operator = PACKED if product.op_type == PRODUCT else INTEGER_PACKED
            _replace(model, attention, operator, inputs, product.name)
            model.graph.remove([split, product], safe=True)


def unpack(model: ir.Model) -> None:
    """Takes each fp32 attention and its product apart, in place: what `pack` does, backwards.

    Args:
        model: A fused encoder.
    """
    for packed in [node for node in model.graph if node.op_type == PACKED]:
        given, weight, bias, mask = [optional_input(packed, index) for index in range(4)]
        product = ir.node(PRODUCT, [given, weight], name=packed.name)
        split = ir.node(
            "Split", product.outputs, {"axis": -1, "num_outputs": PARTS}, num_outputs=PARTS, name=f"{packed.name}/split"
        )
        model.graph.insert_before(packed, [product, split])
        _replace(model, packed, UNPACKED, [*split.outputs, bias, mask], f"{packed.name}/attention")


def _split_before(attention: ir.Node) -> ir.Node | None:
    """The split in equal widths whose parts are the query, the key and the value, if nobody else reads them."""
    parts = attention.inputs[:PARTS]
    split = parts[0].producer() if parts[0] is not None else None
    if split is None or split.op_type != "Split" or list(split.outputs) != list(parts):
        return None
    alone = all(len(part.uses()) == 1 for part in split.outputs)
    widths = optional_input(split, 1)
    given = np.unique(widths.const_value.numpy()) if widths is not None and widths.const_value is not None else [1]
    return split if alone and len(given) == 1 else None


def _packed_inputs(product: ir.Node, attention: ir.Node) -> Inputs | None:
    """What the packed operator reads, in its order."""
    result = product.outputs[0]
    bias, mask, position_bias = [optional_input(attention, index) for index in (BIAS, PADDING_MASK, POSITION_BIAS)]
    if bias is None or position_bias is not None or len(result.uses()) != 1:
        return None
    given, weight, *scales = product.inputs[:5]
    if not scales:
        return [given, weight, bias, mask]
    scale, weight_scale, zero_point = scales
    return [given, weight, bias, scale, weight_scale, mask, zero_point]


def _replace(model: ir.Model, old: ir.Node, operator: str, inputs: Inputs, name: str | None) -> None:
    last = max(index for index, value in enumerate(inputs) if value is not None)
    node = ir.node(operator, inputs[: last + 1], old.attributes, domain=CONTRIB, name=name)
    node.outputs[0].shape, node.outputs[0].type = old.outputs[0].shape, old.outputs[0].type
    model.graph.insert_before(old, node)
    ir.convenience.replace_all_uses_with(old.outputs[0], node.outputs[0])
    model.graph.remove(old, safe=True)
