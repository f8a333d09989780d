"""Sensitivity: how far a model's answers move when one of its products becomes INT8 and the others stay in fp32.

Each product stands in one graph twice, and an input of the graph says which of the two runs. So the products are
compared without a graph, a file and a session for each, and the product that is measured is the one that will serve.

Source: Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3.7, the analysis of layers one at a
time. We differ in the criterion: logits of the user's texts rather than accuracy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from hasten.errors import ArtifactError
from hasten.graph_values import add_constant
from hasten.packing import CONTRIB, INTEGER_PACKED, INTEGER_PRODUCT, PRODUCT

SWITCHES = "products_in_int8"
MATRIX_SCALES_AND_ZERO_POINT = {INTEGER_PRODUCT: (1, 2, 3, 4), INTEGER_PACKED: (1, 3, 4, 6)}  # as inputs

Feed = Mapping[str, Any]


def sensitivities(plain: Path, quantized: Path, feeds: Sequence[Feed], *, threads: int) -> dict[str, float]:
    """Measures each product of a graph.

    Args:
        plain: The ONNX graph just before its products became INT8, its attentions unpacked.
        quantized: What became of it, by the static method.
        feeds: Inputs of the graph, one batch after another.
        threads: Threads for an inference.

    Returns:
        The mean over texts of the largest move of a logit, by the name of the product that moved it, the worst first.
        Products that share their weights are measured together, under the name of the first.

    Raises:
        ArtifactError: No product of the graph became INT8.
    """
    model = ir.load(plain)
    groups = _add_integer_products(model, ir.load(quantized))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    del model, content

    def logits(switches: Any) -> Any:
        return np.concatenate([np.asarray(session.run(["logits"], {**feed, SWITCHES: switches})[0]) for feed in feeds])

    before = logits(np.zeros(len(groups), np.bool_))
    alone = zip(groups, np.eye(len(groups), dtype=np.bool_), strict=True)
    moves = {name: float(np.abs(logits(one) - before).max(axis=-1).mean()) for name, one in alone}
    return dict(sorted(moves.items(), key=lambda move: -move[1]))


def _add_integer_products(model: ir.Model, quantized: ir.Model) -> list[str]:
    """Gives each product its other form, and a switch; those of the same weights share one. Names, one a switch."""
    integer = {node.name: node for node in quantized.graph if node.op_type in MATRIX_SCALES_AND_ZERO_POINT}
    groups: dict[ir.Value | None, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if node.op_type == PRODUCT and node.name in integer:
            groups[node.inputs[1]].append(node)
    if not groups:
        raise ArtifactError("no product of the graph became INT8 by the static method; there is nothing to compare")
    switches = ir.Value(name=SWITCHES, shape=ir.Shape([len(groups)]), type=ir.TensorType(ir.DataType.BOOL))
    model.graph.inputs.append(switches)
    model.graph.opset_imports.setdefault(CONTRIB, 1)
    added: dict[ir.Value, ir.Value] = {}
    for number, products in enumerate(groups.values()):
        place = add_constant(model.graph, f"{SWITCHES}.{number}", np.array([number], np.int64))
        chosen = ir.node("Gather", [switches, place])
        model.graph.insert_before(products[0], chosen)
        for product in products:
            _make_switchable(model.graph, product, integer[product.name], chosen.outputs[0], added)
    return [str(products[0].name) for products in groups.values()]


def _make_switchable(
    graph: ir.Graph, product: ir.Node, integer: ir.Node, switch: ir.Value, added: dict[ir.Value, ir.Value]
) -> None:
    """Replaces a product by the choice between itself and its INT8 form; layers may share constants."""
    for place in MATRIX_SCALES_AND_ZERO_POINT[integer.op_type]:
        value = integer.inputs[place]
        if value is None or value.const_value is None:
            raise ArtifactError(f"{product.name}: its INT8 form reads {value}, which is no constant")
        if value not in added:
            added[value] = add_constant(graph, f"{product.name}.int8.{place}", value.const_value.numpy())
    read = [integer.inputs[place] for place in MATRIX_SCALES_AND_ZERO_POINT[integer.op_type]]
    matrix, scale, matrix_scale, zero_point = (added[value] for value in read if value is not None)
    rounded = ir.node("QuantizeLinear", [product.inputs[0], scale, zero_point])
    chosen = ir.node(INTEGER_PRODUCT, [*rounded.outputs, matrix, scale, matrix_scale, zero_point], domain=CONTRIB)
    plain = ir.node(PRODUCT, product.inputs)
    for node, name in ((rounded, "rounded"), (chosen, "int8"), (plain, "fp32")):
        node.outputs[0].name = f"{product.name}.{name}"  # unlike any other, in whichever graph
    branches = {"then_branch": _branch([rounded, chosen]), "else_branch": _branch([plain])}
    choice = ir.node("If", [switch], branches)
    graph.insert_before(product, choice)
    ir.convenience.replace_all_uses_with(product.outputs[0], choice.outputs[0])
    graph.remove(product, safe=True)


def _branch(nodes: Sequence[ir.Node]) -> ir.Graph:
    return ir.Graph([], nodes[-1].outputs, nodes=nodes, name=nodes[-1].op_type)
