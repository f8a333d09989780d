"""Reshapes: constant shapes in place of computed ones, with the same results as onnxruntime has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from hasten.reshapes import fix_reshapes

Sizes = Sequence[int | str | None]


def view(before: Sizes, after: Sizes, written: Sequence[int | str]) -> Any:
    """A reshape as the exporter writes it: to a concatenation of sizes, those of the input by index as text."""
    constants = [numpy_helper.from_array(np.array([0, 1, 2, 3][: len(before)]), "all")]
    nodes, parts = [helper.make_node("Shape", ["x"], ["sizes"], "sizes")], list[str]()
    for place, size in enumerate(written):
        value = int(size)
        constants.append(numpy_helper.from_array(np.array([value]), f"c{place}"))
        parts.append(f"c{place}")
        if isinstance(size, str):
            nodes.append(helper.make_node("Gather", ["sizes", f"c{place}"], [f"s{place}"], f"s{place}"))
            parts[-1] = f"s{place}"
    nodes += [
        helper.make_node("Concat", parts, ["shape"], "shape", axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"], "view", allowzero=1),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", before), ("y", after))]
    graph = helper.make_graph(nodes, "view", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: Any, given: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": given})[0])


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("before", "after", "written", "shape"),
    [
        (["batch", "sequence", 24], ["batch", "sequence", 4, 6], ["0", "1", -1, 6], [0, 0, 4, 6]),
        (["batch", "sequence", 4, 6], ["batch", "sequence", 24], ["0", "1", -1], [0, 0, 24]),
        (["batch", 4, "sequence", 6], ["4*batch", "sequence", 6], [-1, "2", 6], None),
        (["batch", 4, 6], ["4*batch", 6], [-1, 6], [-1, 6]),
        (["batch", "sequence"], ["sequence", "batch"], ["1", "0"], None),
        ([None, None, 24], [None, None, 4, 6], ["0", "1", -1, 6], None),
        ([None, 3, 24], [None, 3, 4, 6], ["0", 3, -1, 6], [-1, 3, 4, 6]),
    ],
)  # fmt: skip
def test_shapes_that_can_be_told_become_constant(
    before: Sizes, after: Sizes, written: Sequence[int | str], shape: list[int] | None
) -> None:
    model = view(before, after, written)
    fixed = fix_reshapes(model)
    onnx.checker.check_model(fixed, full_check=True)
    if shape is None:
        assert operators(fixed) == operators(model)
    else:
        assert operators(fixed) == ["Reshape"]
        constants = {initializer.name: numpy_helper.to_array(initializer) for initializer in fixed.graph.initializer}
        assert constants[fixed.graph.node[0].input[1]].tolist() == shape
    for batch, sequence in ((1, 1), (2, 5), (5, 2)):
        known = {"batch": batch, "sequence": sequence, None: 3}
        sizes = [known[size] if not isinstance(size, int) else size for size in before]
        given = np.random.default_rng(0).normal(size=sizes).astype(np.float32)
        np.testing.assert_array_equal(run(fixed, given), run(model, given))


def test_a_size_of_zero_is_not_taken_for_the_input_s() -> None:
    model = view(["batch", 3], [0, "batch"], [0, "0"])
    assert operators(fix_reshapes(model)) == operators(model)
