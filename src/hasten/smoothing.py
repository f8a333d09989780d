"""Smoothing: outliers of activations are moved into the weights, where 8 bits have room for them.

A product X W is (X / s) (s W) for any scale s of the inner channels. With s large where X has outliers, what is rounded
is even on both sides. Where X is an attention's output, 1 / s goes into the weights of the values that it averages and
costs nothing; elsewhere the division is an operator of its own, since the residual path reads the same activations. So
the products after an attention are smoothed in any case, and of the others as many as are asked for.

Source: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
section 4, equation 4. We differ in that scales are normalised to a geometric mean of 1, and in the division, which the
paper folds into the normalisation before it: encoders normalise after the residual sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRODUCT, ATTENTION = "MatMul", "MultiHeadAttention"
VALUE, BIAS = 2, 3  # inputs of MultiHeadAttention
SMALLEST = 1e-5

Channels = NDArray[np.float32]


def channel_peaks(graph: Any, products: Sequence[str], feeds: Iterable[Mapping[str, Any]]) -> dict[str, Channels]:
    """Largest magnitude of each channel of the products' inputs.

    Args:
        graph: A fp32 ONNX `ModelProto`.
        products: Names of products of activations with weights.
        feeds: Inputs of the graph, one batch after another.

    Returns:
        By the name of the tensor that is multiplied; each of shape [channels].
    """
    import onnx
    import onnxruntime as ort

    tensors = sorted({node.input[0] for node in graph.graph.node if node.name in products})
    probe = onnx.ModelProto()
    probe.CopyFrom(graph)
    probe.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors
    )
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    peaks: dict[str, Channels] = {}
    for feed in feeds:
        for name, found in zip(tensors, session.run(tensors, dict(feed)), strict=True):
            values = np.abs(np.asarray(found, dtype=np.float32))
            magnitude: Channels = values.reshape(-1, values.shape[-1]).max(axis=0)
            peaks[name] = np.maximum(peaks[name], magnitude) if name in peaks else magnitude
    return peaks


def smoothing_scales(peaks: Channels, weights: NDArray[np.float32], strength: float) -> Channels:
    """The scale of each inner channel of a product.

    Args:
        peaks: Largest magnitude of the activations; shape [channels].
        weights: Shape [channels, outputs].
        strength: Share of the difficulty that goes into the weights, 0 to 1; the paper's alpha.

    Returns:
        Scales above 0 with a geometric mean of 1; shape [channels].
    """
    largest = np.maximum(np.abs(weights).max(axis=1), SMALLEST)
    scales = np.maximum(peaks, SMALLEST) ** strength / largest ** (1 - strength)
    return (scales / np.exp(np.log(scales).mean())).astype(np.float32)


def smooth(
    graph: Any,
    products: Sequence[str],
    peaks: Mapping[str, Channels],
    strength: float,
    only: Container[str] | None = None,
) -> None:
    """Rewrites a graph in place so that its products are easier to quantize and its answers the same up to rounding.

    Args:
        graph: A fp32 ONNX `ModelProto`.
        products: Names of the products that will be quantized.
        peaks: What `channel_peaks` gave for them.
        strength: See `smoothing_scales`.
        only: Names of those that may be given an operator for it; any of them if None. Products that share their
            weights are smoothed if one of them may.
    """
    editor = _Editor(graph)
    for weight, nodes in _by_weights(
        graph, products
    ).items():  # layers may share a matrix, and then they share the scale
        constants = editor.values_before(nodes)
        if constants is None and only is not None and not any(node.name in only for node in nodes):
            continue
        together = np.max([peaks[node.input[0]] for node in nodes], axis=0)
        scales = smoothing_scales(together, editor.content(weight), strength)
        editor.multiply_rows(weight, scales)
        if constants is not None:
            editor.divide_values(constants, scales)
        else:
            for node in nodes:
                editor.divide_input(node, scales)
    editor.finish()


def smoothed_freely(graph: Any, products: Sequence[str]) -> set[str]:
    """Products whose smoothing takes no operator.

    Args:
        graph: A fp32 ONNX `ModelProto`.
        products: Names of products of activations with weights.

    Returns:
        Names of those of them that read an attention's output, and nobody else does.
    """
    editor = _Editor(graph)
    groups = _by_weights(graph, products).values()
    return {node.name for nodes in groups if editor.values_before(nodes) is not None for node in nodes}


def _by_weights(graph: Any, products: Sequence[str]) -> dict[str, list[Any]]:
    sharing: dict[str, list[Any]] = defaultdict(list)
    for node in graph.graph.node:
        if node.name in products:
            sharing[node.input[1]].append(node)
    return sharing


class _Editor:
    """Changes of one graph."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph.graph
        self._weights = {initializer.name: initializer for initializer in self._graph.initializer}
        self._makers = {output: node for node in self._graph.node for output in node.output}
        self._readers: dict[str, list[Any]] = defaultdict(list)
        for node in self._graph.node:
            for name in node.input:
                self._readers[name].append(node)
        self._before: dict[str, Any] = {}

    def _maker(self, tensor: str, operator: str) -> Any:
        """The node that makes a tensor, if it is this operator."""
        node = self._makers.get(tensor)
        return node if node is not None and node.op_type == operator else None

    def content(self, name: str) -> NDArray[np.float32]:
        """A constant tensor."""
        from onnx import numpy_helper

        return np.array(numpy_helper.to_array(self._weights[name]))

    def _replace(self, name: str, content: NDArray[np.float32]) -> None:
        from onnx import numpy_helper

        self._weights[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(content), name))

    def multiply_rows(self, name: str, scales: Channels) -> None:
        """Scales a matrix by inner channel."""
        self._replace(name, self.content(name) * scales[:, None])

    def values_before(self, products: Sequence[Any]) -> set[str] | None:
        """Names of the weights and biases that make the values which attentions average just before these products.

        Args:
            products: The products.

        Returns:
            None where a product reads from something else, or where anybody else reads the weights and biases.
        """
        constants, readers = set[str](), set[str]()
        for product in products:
            attention = self._maker(product.input[0], ATTENTION)
            split = self._maker(attention.input[VALUE], "Split") if attention else None
            merged = self._maker(split.input[0], PRODUCT) if split else None
            if attention is None or split is None or merged is None or split.output[-1] != attention.input[VALUE]:
                return None
            constants |= {merged.input[1], *attention.input[BIAS : BIAS + 1]} - {""}
            readers |= {attention.name, merged.name}
        alone = all({node.name for node in self._readers[name]} <= readers for name in constants)
        return constants if alone and constants <= self._weights.keys() else None

    def divide_values(self, constants: set[str], scales: Channels) -> None:
        """Folds the division into what makes the values: the last columns beside those of query and key."""
        for name in constants:
            content = self.content(name)
            content[..., -len(scales) :] /= scales
            self._replace(name, content)

    def divide_input(self, product: Any, scales: Channels) -> None:
        """Puts a division before a product."""
        import onnx

        factor, smoothed = f"{product.name}.smoothing", f"{product.name}.smoothed"
        self._graph.initializer.append(onnx.numpy_helper.from_array((1 / scales).astype(np.float32), factor))
        name = f"{product.name}.smooth"
        self._before[product.name] = onnx.helper.make_node("Mul", [product.input[0], factor], [smoothed], name=name)
        product.input[0] = smoothed

    def finish(self) -> None:
        """Puts the new operators where they belong."""
        nodes = [part for node in self._graph.node for part in (self._before.get(node.name), node) if part is not None]
        ordered = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del self._graph.node[:]
        self._graph.node.extend(ordered)
