"""Packing and integer products: the same answers from fewer operators, as onnxruntime runs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from hasten.integer_products import use_integer_products
from hasten.packing import CONTRIB, pack, unpack

HEADS, WIDTH = 2, 8
PARTS = ["q", "k", "v"]


def layer(
    *, position_bias: bool = False, bias: bool = True, shared: bool = False, integer: bool = False,
    parts: Sequence[str] = PARTS, widths: Sequence[int] = (WIDTH,) * 3,
) -> ir.Model:  # fmt: skip
    """One attention after one product, with a second product after it."""
    random = np.random.default_rng(0)
    constants = {
        "qkv": random.normal(size=(WIDTH, 3 * WIDTH)).astype(np.float32),
        "qkv_bias": random.normal(size=3 * WIDTH).astype(np.float32),
        "out": random.normal(size=(WIDTH, WIDTH)).astype(np.float32),
        "out_bias": random.normal(size=WIDTH).astype(np.float32),
        "positions": random.normal(size=(1, HEADS, 1, 1)).astype(np.float32),
        "widths": np.array(widths),
    }
    inputs = [*PARTS, "qkv_bias" if bias else "", "mask", "positions" if position_bias else ""]
    nodes = [
        *product("x", "qkv", "merged", integer, constants),
        helper.make_node("Split", ["merged", "widths"], parts, "split", axis=-1),
        helper.make_node("MultiHeadAttention", inputs, ["y"], "attention", domain=CONTRIB, num_heads=HEADS),
        *product("y", "out", "projected", integer, constants),
        helper.make_node("Add", ["out_bias", "projected"], ["biased"], "bias"),
        helper.make_node("Sum", ["biased", restored("x", integer)], ["z"], "residual"),
    ]
    if shared:
        nodes.append(helper.make_node("Identity", ["k"], ["keys"], "reader"))
    shape = ["batch", "tokens", WIDTH]
    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
         helper.make_tensor_value_info("mask", TensorProto.INT32, ["batch", "tokens"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ["z", *["keys"] * shared]],
        [numpy_helper.from_array(content, name) for name, content in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(CONTRIB, 1)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def restored(name: str, integer: bool) -> str:
    return f"{name}_restored" if integer else name


def product(
    given: str, weight: str, made: str, integer: bool, constants: dict[str, np.ndarray]
) -> list[onnx.NodeProto]:
    """A product, with the pairs that a quantizer puts before it if asked for."""
    if not integer:
        return [helper.make_node("MatMul", [given, weight], [made], f"/{weight}")]
    scales = np.abs(constants[weight]).max(axis=0) / 127
    rounded = np.rint(constants[weight] / scales).astype(np.int8)
    constants |= {
        weight: rounded, f"{weight}_scale": scales.astype(np.float32), f"{weight}_zero": np.zeros_like(rounded[0]),
        f"{given}_scale": np.float32(0.05), f"{given}_zero": np.uint8(120),
    }  # fmt: skip
    places = [f"{given}_scale", f"{given}_zero"]
    return [
        helper.make_node("QuantizeLinear", [given, *places], [f"{given}_rounded"]),
        helper.make_node("DequantizeLinear", [f"{given}_rounded", *places], [f"{given}_restored"]),
        helper.make_node(
            "DequantizeLinear", [weight, f"{weight}_scale", f"{weight}_zero"], [f"{weight}_restored"], axis=1
        ),
        helper.make_node("MatMul", [f"{given}_restored", f"{weight}_restored"], [made], f"/{weight}"),
    ]


def answers(model: ir.Model) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(size=(3, 5, WIDTH)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], np.int32)
    return [np.asarray(found) for found in session.run(None, {"x": x, "mask": mask})]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_packing_and_unpacking_change_no_answer() -> None:
    model = layer()
    before = answers(model)
    pack(model)
    assert operators(model) == {"Attention": 1, "MatMul": 1, "Add": 1, "Sum": 1}
    assert [node.name for node in model.graph if node.op_type == "Attention"] == ["/qkv"]
    np.testing.assert_allclose(answers(model)[0], before[0], atol=1e-5)
    unpack(model)
    assert operators(model) == operators(layer())
    np.testing.assert_allclose(answers(model)[0], before[0], atol=1e-5)


@pytest.mark.parametrize(
    "kept",
    [
        {"position_bias": True},
        {"bias": False},
        {"shared": True},
        {"parts": PARTS[::-1]},
        {"widths": (WIDTH // 2, WIDTH // 2, 2 * WIDTH)},
    ],
    ids=["position bias", "no bias", "shared", "another order", "other widths"],
)
def test_what_the_packed_operator_cannot_express_is_left(kept: dict[str, Any]) -> None:
    model = layer(**kept)
    pack(model)
    assert operators(model) == operators(layer(**kept))


def test_integer_products_answer_as_the_pairs_they_were_made_of() -> None:
    pairs, model = layer(integer=True), layer(integer=True)
    use_integer_products(model)
    assert operators(model) == {"QuantizeLinear": 2, "QAttention": 1, "MatMulIntegerToFloat": 1, "Sum": 1}
    (residual,) = (node for node in model.graph if node.op_type == "Sum")
    assert "x" in [value.name for value in residual.inputs if value is not None], "not the rounded x"
    x = np.random.default_rng(1).normal(size=(3, 5, WIDTH)).astype(np.float32)
    rounded = (np.clip(np.rint(x / np.float32(0.05)) + 120, 0, 255) - 120) * np.float32(0.05)
    np.testing.assert_allclose(answers(model)[0] - x, answers(pairs)[0] - rounded, atol=1e-4)


def test_a_product_left_in_fp32_keeps_its_attention_in_fp32() -> None:
    model = layer()
    use_integer_products(model)
    assert operators(model)["Attention"] == 1
