"""Smoothing: the same function, with outliers where 8 bits have room for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conftest import labelled_rows
from hasten.checkpoint import import_checkpoint
from hasten.errors import ArtifactError, UsageError
from hasten.onnx_export import export
from hasten.packing import unpack
from hasten.quantization import QuantizeOptions, products, quantize, smoothed_by_operators
from hasten.runtime import OnnxRuntime, open_runtime, predict_logits
from hasten.smoothing import channel_peaks, smooth, smoothing_scales
from hasten.variant import PlanRow, ThreadPlan, Variant, building, open_variant, seal

TEXTS = [text for text, _ in labelled_rows(40, seed=8)]
FINITE = st.floats(0, 1e4, width=32)


def exported(architecture: str, checkpoint: Callable[[str], Path], folder: Path) -> Variant:
    source = import_checkpoint(str(checkpoint(architecture)), folder / "torch-fp32")
    return export(source, folder / "onnx-fp32", texts=TEXTS)


def with_graph(source: Variant, out: Path, change: Callable[[Any], None]) -> Variant:
    """A copy whose graph was changed."""
    with building(out) as draft:
        for path in source.path.iterdir():
            (draft / path.name).write_bytes(path.read_bytes())
        plain = ir.load(draft / "model.onnx")
        unpack(plain)
        graph = ir.to_proto(plain)
        change(graph)
        onnx.save_model(graph, draft / "model.onnx")
        seal(draft, source.manifest)
    return open_variant(out)


def smoothed(source: Variant, out: Path) -> Variant:
    runtime = OnnxRuntime(source, threads=1)
    feeds = [runtime.feed([encoding]) for encoding in runtime.encode(TEXTS)]

    def change(graph: Any) -> None:
        found = list(products(source))
        smooth(graph, found, channel_peaks(graph, found, feeds), 0.7)

    return with_graph(source, out, change)


@pytest.mark.parametrize("architecture", ["albert", "deberta-v2"])
def test_answers_stay_the_same(architecture: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = exported(architecture, checkpoint, tmp_path)
    other = smoothed(source, tmp_path / "smoothed")
    before, after = (predict_logits(OnnxRuntime(v, threads=1), TEXTS, batch=7) for v in (source, other))
    assert other.digest != source.digest
    np.testing.assert_allclose(after, before, atol=2e-5)


def test_after_attention_smoothing_costs_no_operator(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = exported("bert", checkpoint, tmp_path)
    graph = onnx.load_model(smoothed(source, tmp_path / "smoothed").path / "model.onnx").graph
    divided = {node.name for node in graph.node if node.name.endswith(".smooth")}
    assert len(divided) == 6  # of 2 layers with 4 products each, those of the attention's output are free
    assert not any("attention.output" in name for name in divided)


def test_of_those_that_cost_an_operator_only_the_named_are_smoothed(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = exported("bert", checkpoint, tmp_path)
    dear = smoothed_by_operators(source)
    named = sorted(dear)[:2]
    made = quantize(source, tmp_path / "int8", QuantizeOptions(smoothing=0.7, smoothed=tuple(named)), texts=TEXTS)
    graph = onnx.load_model(made.path / "model.onnx").graph
    assert {*products(source)} - dear == {name for name in products(source) if "attention.output" in name}
    assert sorted(n.name.removesuffix(".smooth") for n in graph.node if n.name.endswith(".smooth")) == named
    rounded = {name: after_rounding(graph, name) for name in products(source)}
    plain = onnx.load_model(quantize(source, tmp_path / "plain", texts=TEXTS).path / "model.onnx").graph
    changed = {name for name in rounded if rounded[name] != pytest.approx(after_rounding(plain, name), rel=1e-3)}
    assert changed == {*products(source)} - dear | {*named}


def after_rounding(graph: Any, product: str) -> float:
    """The step that a product's input is rounded by."""
    (rounding,) = (node for node in graph.node if node.name == f"{product}_QuantizeLinear")
    (scale,) = (tensor for tensor in graph.initializer if tensor.name == rounding.input[1])
    return float(onnx.numpy_helper.to_array(scale).item())


def outliers(graph: Any) -> None:
    """Makes one channel of the activations large and its weights small, which changes no answer."""
    weights = {initializer.name: initializer for initializer in graph.graph.initializer}
    (product,) = (n for n in graph.graph.node if n.op_type == "MatMul" and "layer.0.intermediate" in n.name)
    (norm,) = (n for n in graph.graph.node if product.input[0] in n.output)
    factors = np.ones(32, np.float32)
    factors[3] = 300.0
    for name, by in ((norm.input[1], factors), (norm.input[2], factors), (product.input[1], 1 / factors[:, None])):
        content = onnx.numpy_helper.to_array(weights[name]) * by
        weights[name].CopyFrom(onnx.numpy_helper.from_array(content.astype(np.float32), name))


def test_an_outlier_channel_is_smoothed_away(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = with_graph(exported("bert", checkpoint, tmp_path), tmp_path / "outliers", outliers)
    moves = {}
    for smoothing in (0.0, 0.7):
        made = quantize(source, tmp_path / f"int8-{smoothing}", QuantizeOptions(smoothing=smoothing), texts=TEXTS)
        moves[smoothing] = made.manifest.step.facts["against_fp32"]["mean_logit_difference"]
        assert made.manifest.batch_invariant
        assert made.manifest.step.options["smoothing"] == smoothing
    assert moves[0.7] < 0.5 * moves[0.0]


@given(
    hnp.arrays(np.float32, 6, elements=FINITE), hnp.arrays(np.float32, (6, 4), elements=FINITE), st.floats(0, 1)
)  # fmt: skip
def test_scales_are_positive_and_centred(peaks: np.ndarray, weights: np.ndarray, strength: float) -> None:
    scales = smoothing_scales(peaks, weights, strength)
    assert (scales > 0).all()
    assert np.isfinite(scales).all()
    assert np.exp(np.log(scales.astype(np.float64)).mean()) == pytest.approx(1, rel=1e-3)


def test_full_strength_evens_out_the_activations() -> None:
    peaks = np.array([1.0, 10.0, 100.0], np.float32)
    scales = smoothing_scales(peaks, np.ones((3, 2), np.float32), 1.0)
    np.testing.assert_allclose(peaks / scales, np.full(3, 10.0), rtol=1e-5)


def test_half_strength_makes_both_sides_equally_hard_and_none_evens_out_the_weights() -> None:
    peaks, weights = np.array([1, 10, 100], np.float32), np.array([[4], [1], [0.5]], np.float32)
    half = smoothing_scales(peaks, weights, 0.5)
    even = (peaks / half) / (weights[:, 0] * half)
    np.testing.assert_allclose(even, np.full(3, even[0]), rtol=1e-4)
    even = weights[:, 0] * smoothing_scales(peaks, weights, 0.0)
    np.testing.assert_allclose(even, np.full(3, even[0]), rtol=1e-4)


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, float("nan")])
def test_a_strength_out_of_range_is_refused(smoothing: float) -> None:
    with pytest.raises(UsageError, match="smoothing is a share"):
        QuantizeOptions(smoothing=smoothing)


def test_no_text_to_calibrate_on_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 text"):
        QuantizeOptions(calibration_texts=0)


def shared(graph: Any) -> None:
    """Lets the second layer's output product of attention read the first layer's matrix, as ALBERT's layers do."""
    nodes = [node for node in graph.graph.node if node.op_type == "MatMul"]
    first, second = (next(n for n in nodes if f"layer.{i}.attention.output" in n.name) for i in (0, 1))
    second.input[1] = first.input[1]


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
def test_products_that_share_weights_stay_in_fp32_together(
    smoothing: float, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = with_graph(exported("bert", checkpoint, tmp_path), tmp_path / "shared", shared)
    names = products(source)
    (pair,) = ([name for name in names if names[name] == weights] for weights in set(names.values())
               if list(names.values()).count(weights) == 2)  # fmt: skip
    others = tuple(name for name in names if name not in pair)
    kept = quantize(source, tmp_path / "kept", QuantizeOptions(keep=pair[:1], smoothing=smoothing), texts=TEXTS)
    graph = onnx.load(kept.path / "model.onnx").graph
    types = {initializer.name: initializer.data_type for initializer in graph.initializer}
    floats = {node.name for node in graph.node if len(node.input) > 1 and types.get(node.input[1]) == 1}
    assert {*pair} <= floats
    assert not {*others} & floats
    runtimes = (OnnxRuntime(variant, threads=1) for variant in (source, kept))
    before, after = (predict_logits(runtime, TEXTS) for runtime in runtimes)
    assert float(np.abs(after - before).max()) < 0.1


def test_a_plan_of_threads_is_of_the_graph_it_was_measured_on(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = exported("bert", checkpoint, tmp_path)
    plan = ThreadPlan(cpu="", cores=1, rows=[PlanRow(workers=1, threads=1, alone_p50_ms=1.0, texts_per_s=1.0)])
    planned = replace(source, manifest=replace(source.manifest, plan=plan))
    assert quantize(planned, tmp_path / "int8", texts=TEXTS[:5]).manifest.plan is None


def test_a_full_disk_is_told_before_anything_is_written(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported("bert", checkpoint, tmp_path)
    full = SimpleNamespace(free=3 * source.size_bytes)
    monkeypatch.setattr("hasten.quantization.shutil.disk_usage", lambda _place: full)
    with pytest.raises(ArtifactError, match=r"MB are free, and quantizing .* takes .* MB for a while; make room"):
        quantize(source, tmp_path / "int8", texts=TEXTS[:5])
    assert not (tmp_path / "int8").exists()


@pytest.mark.parametrize(
    "architecture", ["albert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta"]
)
def test_every_architecture_is_faithful_and_batch_invariant_in_int8(
    architecture: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = exported(architecture, checkpoint, tmp_path)
    there = sorted(source.path.iterdir())
    made = quantize(source, tmp_path / "int8", QuantizeOptions(smoothing=0.5), texts=TEXTS)
    assert made.manifest.batch_invariant
    operators = Counter(node.op_type for node in onnx.load(made.path / "model.onnx").graph.node)
    assert operators["MatMulIntegerToFloat"] + operators["QAttention"] == len(products(source)) > 0
    assert not set(products(source)) & set(products(made))
    before, after = predict_logits(open_runtime(source), TEXTS), predict_logits(open_runtime(made), TEXTS)
    assert np.abs(after - before).max() <= 0.1 * np.abs(before).max()
    assert sorted(source.path.iterdir()) == there


def test_a_quantizer_that_fails_leaves_nothing_in_the_folder_it_reads(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, *_: object, **__: object) -> None:
        (path.parent / "model-inferred.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    source = exported("bert", checkpoint, tmp_path)
    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "int8", texts=TEXTS)
    assert open_variant(source.path) == source
