"""Fusion: the traced graph of an encoder, rewritten into few large operators; which ones it must have is enforced.

Per layer there is one attention with its product for query, key and value, one sum with its normalisation after each
half and one activation with its bias. The patterns of single operators are ONNX Script's and onnxruntime's. Five
rewrites are our own, since neither has them:

- products of one input with several weights become one product and a split, and both become part of the attention
  (see `hasten.packing`);
- a position bias and a mask, added one after the other to the scores, are added to each other first, which leaves
  the one addend that the attention operator takes (MPNet);
- an attention bias that is nothing but the padding mask becomes the operator's own padding mask, which saves some
  twenty small nodes a text; that it is one is established by running it;
- what depends on weights alone is computed once, whatever its size (DeBERTa's products of its table of positions);
- a sum that is normalised becomes `Sum`, which means the same as `Add` but is left alone when onnxruntime loads the
  graph: it would make one `SkipLayerNormalization` of sum and normalisation, whose kernel for CPUs takes three
  to four times as long as the two (onnxruntime 1.32).

What these operators cannot express stays as it was traced: disentangled attention (DeBERTa), and the rotation of
queries and keys before the fused attention (ModernBERT), which keeps its products outside.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from os.path import commonpath
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime as ort
from onnxscript.optimizer import optimize
from onnxscript.rewriter import pattern
from onnxscript.rewriter.ort_fusions import shape_optimization
from onnxscript.rewriter.ort_fusions.bias_gelu import fuse_bias_gelu
from onnxscript.rewriter.ort_fusions.erfgelu import fuse_erfgelu
from onnxscript.rewriter.ort_fusions.gelu import fuse_gelu
from onnxscript.rewriter.ort_fusions.mha import fuse_mha2
from onnxscript.rewriter.ort_fusions.mha_bias import fuse_mha_bias
from onnxscript.rewriter.ort_fusions.mha_scale import fuse_mha_scale
from onnxscript.rewriter.ort_fusions.sdpa import fuse_sdpa
from onnxscript.rewriter.ort_fusions.sdpa_via_mha import replace_sdpa_by_mha

from hasten.errors import ArtifactError
from hasten.graph_values import add_constant, optional_input
from hasten.packing import CONTRIB, PACKED, PADDING_MASK, POSITION_BIAS, UNPACKED, pack

# onnxruntime's fusion classes import each other from their own folder, which its package puts on the path.
from onnxruntime.transformers.onnx_model import OnnxModel  # isort: skip
from onnxruntime.transformers.fusion_biasgelu import FusionBiasGelu  # isort: skip
from onnxruntime.transformers.fusion_fastgelu import FusionFastGelu  # isort: skip

MASKED_BELOW = -1e4
LONGEST_PROBE_TOKENS = 2048  # a mask that reaches farther is large, and may hide a window that shorter probes miss
OPERATORS = {
    "query-key-value product": ("/qkv", ".Wqkv/"),
    "attention": (UNPACKED, PACKED),
    "normalised sum": ("/normalised_sum",),
    "activation": ("BiasGelu", "FastGelu", "Gelu"),
}
UNFUSABLE = {"deberta-v2": ("attention",)}
UNSUMMED_EMBEDDINGS = ("deberta-v2", "modernbert")  # their positions come in with the attention
HEAD_ACTIVATIONS = {"deberta-v2": "pooler_hidden_act", "modernbert": "classifier_activation"}  # where it is configured
HEADS_WITH_GELU = ("electra",)
FUSED_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def fuse(traced: onnx.ModelProto, longest_tokens: int) -> onnx.ModelProto:
    """Rewrites a traced encoder.

    Args:
        traced: The graph as the exporter gave it, its inputs named as transformers names them, batch and sequence
            symbolic, its nodes named `<module path>/<name>`.
        longest_tokens: Longest sequence that the model takes, in tokens; masks are probed at that length.

    Returns:
        A graph with the same inputs and outputs, equal up to rounding.
    """
    model = ir.serde.deserialize_model(traced)
    _tidy(model)
    fuse_erfgelu(model)
    _ONE_ADDEND.apply_to_model(model)
    passes.CommonSubexpressionEliminationPass()(model)
    fuse_sdpa(model, apply_shape_inference=True)
    for fusion in (fuse_mha2, fuse_mha_scale, fuse_mha_bias, replace_sdpa_by_mha, fuse_gelu, fuse_bias_gelu):
        fusion(model)
    optimize(model)
    _work_out_constants(model)
    _merge_products(model)
    if longest_tokens <= LONGEST_PROBE_TOKENS:
        _use_padding_masks(model, longest_tokens)
    optimize(model)
    pack(model)
    passes.DeduplicateInitializersPass()(model)
    model.graph.opset_imports.setdefault(CONTRIB, 1)
    fused = OnnxModel(ir.serde.serialize_model(model))
    FusionFastGelu(fused).apply()
    FusionBiasGelu(fused, is_fastgelu=True).apply()
    _keep_sums_apart(fused)
    fused.prune_graph()
    fused.topological_sort()
    return fused.model


def _tidy(model: ir.Model) -> None:
    passes.ShapeInferencePass()(model)
    optimize(model)
    shape_optimization.rules.apply_to_model(model)
    optimize(model)


class _OneAddend(pattern.RewriteRuleClassBase):
    """Softmax((scores + bias) + mask) is Softmax(scores + (bias + mask))."""

    def pattern(self, op: Any, queries: Any, keys: Any, scale: Any, bias: Any, mask: Any) -> Any:
        scores = op.MatMul(queries, keys)
        either = [op.Div(scores, scale), op.Mul(scores, scale)]
        scaled = pattern.OrValue(either, tag_var="scaling", tag_values=["/", "*"])
        return op.Softmax(op.Add(op.Add(scaled, bias), mask), axis=-1)

    def rewrite(
        self, op: Any, queries: Any, keys: Any, scale: Any, bias: Any, mask: Any, scaling: str, **_: Any
    ) -> Any:
        scores = op.MatMul(queries, keys)
        scaled = op.Div(scores, scale) if scaling == "/" else op.Mul(scores, scale)
        return op.Softmax(op.Add(scaled, op.Add(bias, mask)), axis=-1)


_ONE_ADDEND = pattern.RewriteRuleSet([_OneAddend.rule()])


def _work_out_constants(model: ir.Model) -> None:
    """Computes what depends on weights alone, as DeBERTa's products of its table of positions.

    onnxruntime does so when it loads a graph, but not where the products are quantized.
    """
    constant: dict[ir.Value, None] = {}  # in the order of the graph, so that exports are alike
    nodes: dict[ir.Node, None] = {}
    for node in model.graph:
        given = [value for value in node.inputs if value is not None]
        if given and all(value.const_value is not None or value in constant for value in given):
            constant |= dict.fromkeys(node.outputs)
            nodes[node] = None
    wanted = [value for value in constant if any(user not in nodes for user in value.consumers())]
    if not wanted:
        return
    part = ir.convenience.extract(model.graph, inputs=[], outputs=wanted)
    found: Any = _session(ir.Model(part, ir_version=model.ir_version)).run(None, {})
    for value, content in zip(wanted, found, strict=True):
        ir.convenience.replace_all_uses_with(value, add_constant(model.graph, f"{value.name}.constant", content))
    model.graph.remove(nodes, safe=True)


def _session(model: ir.Model) -> ort.InferenceSession:
    content = ir.serde.serialize_model(model).SerializeToString()
    return ort.InferenceSession(content, providers=["CPUExecutionProvider"])


def _merge_products(model: ir.Model) -> None:
    """Products of one input with several constant matrices become one product and a split."""
    groups: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if node.op_type == "MatMul" and _matrix(node) is not None and (given := node.inputs[0]) is not None:
            groups[given].append(node)
    merged: dict[tuple[str | None, ...], ir.Value] = {}
    for given, nodes in groups.items():
        if len(nodes) > 1:
            _merge(model, given, nodes, merged)


def _matrix(product: ir.Node) -> Any:
    """The constant matrix a product multiplies with; None if there is none."""
    weight = product.inputs[1]
    tensor = weight.const_value if weight is not None else None
    return tensor.numpy() if tensor is not None and len(tensor.shape) == 2 else None


def _merge(
    model: ir.Model, given: ir.Value, nodes: Sequence[ir.Node], merged: dict[tuple[str | None, ...], ir.Value]
) -> None:
    """Layers that share their weights share the merged ones."""
    graph, matrices = model.graph, [_matrix(node) for node in nodes]
    places = [(node.name or "").rpartition("/")[0].replace(".", "/") for node in nodes]
    path = commonpath(places).replace("/", ".")
    key = tuple(node.inputs[1].name for node in nodes if node.inputs[1] is not None)
    if key not in merged:
        merged[key] = add_constant(graph, f"{path}.qkv.weight", np.concatenate(matrices, axis=1))
    number = sum(node.op_type == "Split" for node in graph)
    widths = add_constant(graph, f"{path}.qkv.widths.{number}", np.array([m.shape[1] for m in matrices], np.int64))
    product = ir.node("MatMul", [given, merged[key]], name=f"{path}/qkv_{number}")
    parts = ir.node(
        "Split", [product.outputs[0], widths], {"axis": -1}, num_outputs=len(nodes), name=f"{path}/split_{number}"
    )
    graph.insert_before(nodes[0], [product, parts])
    for node, part in zip(nodes, parts.outputs, strict=True):
        old = node.outputs[0]
        part.shape, part.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, part)
        graph.remove(node, safe=True)


def _use_padding_masks(model: ir.Model, longest_tokens: int) -> None:
    """Hands the padding mask to each attention whose bias is nothing else."""
    attentions = [node for node in model.graph if node.op_type == UNPACKED]
    biases = {bias for node in attentions if (bias := optional_input(node, POSITION_BIAS)) is not None}
    plain = {bias for bias in biases if _is_padding_mask(model, bias, longest_tokens)}
    if not plain:
        return
    (mask,) = (value for value in model.graph.inputs if value.name == "attention_mask")
    cast = ir.node("Cast", [mask], {"to": ir.DataType.INT32}, name="/padding_mask")
    model.graph.insert_before(model.graph[0], cast)
    for node in attentions:
        if optional_input(node, POSITION_BIAS) in plain:
            node.replace_input_with(PADDING_MASK, cast.outputs[0])
            node.replace_input_with(POSITION_BIAS, None)


def _is_padding_mask(model: ir.Model, bias: ir.Value, longest_tokens: int) -> bool:
    """Runs what makes a bias on padded batches: 0 where there is a token, hugely negative where there is none."""
    part = ir.convenience.extract(model.graph, inputs=model.graph.inputs, outputs=[bias])
    session = _session(ir.Model(part, ir_version=model.ir_version))
    for tokens in {2, longest_tokens}:
        mask = np.ones((3, tokens), np.int64)
        mask[1, 1:], mask[2, tokens // 2 + 1 :] = 0, 0
        feeds = {node.name: mask for node in session.get_inputs()}
        found = np.asarray(session.run(None, feeds)[0])
        kept = np.broadcast_to(mask[:, None, None, :] == 1, found.shape)
        if not ((found[kept] == 0).all() and (found[~kept] <= MASKED_BELOW).all()):
            return False
    return True


def _keep_sums_apart(fused: OnnxModel) -> None:
    """Hides the sums before normalisations from onnxruntime's own fusion, and names them after what they belong to."""
    sums = fused.output_name_to_node()
    for number, node in enumerate(fused.get_nodes_by_op_type("LayerNormalization")):
        before = sums.get(node.input[0])
        if before is not None and before.op_type == "Add":
            before.op_type = "Sum"
            before.name = f"{node.name.rpartition('/')[0]}/normalised_sum_{number}"


def require_fused(graph: onnx.ModelProto, config: Any) -> dict[str, Any]:
    """Counts the fused operators and refuses a graph that has fewer than its layers call for.

    Args:
        graph: The fused graph.
        config: The model's configuration, as transformers has it.

    Returns:
        `fused`, operators by what they do, with their count, and `not_fused`, what this architecture leaves as it was.

    Raises:
        ArtifactError: Operators are missing, which would make a slower model.
    """
    kind, layers = config.model_type, int(config.num_hidden_layers)
    left = UNFUSABLE.get(kind, ()) + (() if _activation(config) in FUSED_ACTIVATIONS else ("activation",))
    sums = 2 * layers + int(kind not in UNSUMMED_EMBEDDINGS)
    in_head = int(kind in HEADS_WITH_GELU or getattr(config, HEAD_ACTIVATIONS.get(kind, ""), None) in FUSED_ACTIVATIONS)
    more = {"normalised sum": sums, "activation": layers + in_head}
    wanted: dict[str, int] = dict.fromkeys(OPERATORS, layers) | more
    counts = _counts(graph)
    for what, operators in OPERATORS.items():
        if what not in left and counts[what] < wanted[what]:
            raise ArtifactError(
                f"the export of {kind!r} has {counts[what]} fused operators for the {what} ({' or '.join(operators)}) "
                f"where its {layers} layers and its head call for {wanted[what]}: the installed torch, transformers or "
                "onnxscript write another graph than the one that is known"
            )
    return {"fused": dict(counts), "not_fused": list(left)}


def _activation(config: Any) -> str | None:
    names = ("hidden_act", "activation", "hidden_activation")
    return next((getattr(config, name) for name in names if hasattr(config, name)), None)


def _counts(graph: onnx.ModelProto) -> Counter[str]:
    counts: Counter[str] = Counter()
    for node in graph.graph.node:
        for what, operators in OPERATORS.items():
            counts[what] += node.op_type in operators or any(o in node.name for o in operators if "/" in o)
    return counts
