"""Integer products: a graph with pairs of QuantizeLinear and DequantizeLinear, written in the operators it comes to.

onnxruntime makes integer products of such pairs itself when it loads a graph, but loses three things on the way, which
are mended here:

- the quantizer hands the rounded tensor to all of its readers; those that are no products read the one before rounding
  again, which keeps the residual path in fp32 and saves its conversion;
- a product's bias is added by the product, that of an activation after it too;
- an attention and the product before it become one operator, `QAttention`.

Source: onnxruntime, "Contrib Operators": `com.microsoft.MatMulIntegerToFloat`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from hasten.packing import CONTRIB, INTEGER_PRODUCT, PRODUCT, pack

ROUND, RESTORE = "QuantizeLinear", "DequantizeLinear"


def use_integer_products(model: ir.Model) -> None:
    """Rewrites a statically quantized graph in place; its fp32 attentions are packed as well.

    Args:
        model: A fused encoder, unpacked, as onnxruntime's quantizer gave it in the QDQ format.
    """
    _read_unrounded(model)
    _part_activations_from_biases(model)
    for product in [node for node in model.graph if node.op_type == PRODUCT]:
        given, weight = (_restored(value) for value in product.inputs)
        if given is not None and weight is not None:
            _write_integer_product(model, product, given, weight)
    model.graph.opset_imports.setdefault(CONTRIB, 1)
    pack(model)
    passes.RemoveUnusedNodesPass()(model)


def _restored(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes a value, if one does."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == RESTORE else None


def _read_unrounded(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type in (PRODUCT, RESTORE):
            continue
        for index, value in enumerate(node.inputs):
            restored = _restored(value)
            rounded = restored.inputs[0].producer() if restored is not None and restored.inputs[0] is not None else None
            if rounded is not None and rounded.op_type == ROUND:
                node.replace_input_with(index, rounded.inputs[0])


def _part_activations_from_biases(model: ir.Model) -> None:
    """After what will be an integer product, `BiasGelu` is an addition and `Gelu`, which takes less time by itself."""
    for activation in [node for node in model.graph if node.op_type == "BiasGelu"]:
        product = activation.inputs[0].producer() if activation.inputs[0] is not None else None
        if product is None or product.op_type != PRODUCT or not all(map(_restored, product.inputs)):
            continue
        addition = ir.node("Add", activation.inputs)
        alone = ir.node("Gelu", addition.outputs, domain=CONTRIB, name=activation.name)
        for node, like in ((addition, product), (alone, activation)):
            node.outputs[0].shape, node.outputs[0].type = like.outputs[0].shape, like.outputs[0].type
        model.graph.insert_before(activation, [addition, alone])
        ir.convenience.replace_all_uses_with(activation.outputs[0], alone.outputs[0])
        model.graph.remove(activation, safe=True)


def _write_integer_product(model: ir.Model, product: ir.Node, given: ir.Node, weight: ir.Node) -> None:
    """One operator for a product of integers, for their scales, and for the bias if there is one.

    Weights are symmetric: their zero points are 0 and left out.
    """
    (rounded, scale, zero_point), (matrix, weight_scale) = given.inputs[:3], weight.inputs[:2]
    if rounded is not None and (rounding := rounded.producer()) is not None:
        rounding.name = f"{product.name}_{ROUND}"  # after where it belongs, and not what it rounds
    inputs, result = [rounded, matrix, scale, weight_scale, zero_point], product.outputs[0]
    addition, bias = _bias_after(product)
    if addition is not None:
        inputs, result = [*inputs, None, bias], addition.outputs[0]
    node = ir.node(INTEGER_PRODUCT, inputs, domain=CONTRIB, name=product.name)
    node.outputs[0].shape, node.outputs[0].type = result.shape, result.type
    model.graph.insert_before(product, node)
    ir.convenience.replace_all_uses_with(result, node.outputs[0])


def _bias_after(product: ir.Node) -> tuple[ir.Node, ir.Value] | tuple[None, None]:
    """The addition of a constant vector to a product, and the vector, if that is all that happens to the product."""
    users = product.outputs[0].consumers()
    if len(users) != 1 or users[0].op_type != "Add":
        return None, None
    (other,) = (value for value in users[0].inputs if value is not product.outputs[0])
    if other is None or other.const_value is None or np.ndim(other.const_value.numpy()) != 1:
        return None, None
    return users[0], other
