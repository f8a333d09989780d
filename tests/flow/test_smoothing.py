"""Smoothing: the same function, with outliers where 8 bits have room for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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
from hasten.errors import UsageError
from hasten.intervals import Interval
from hasten.onnx_export import export
from hasten.packing import unpack
from hasten.quantization import QuantizeOptions, products, quantize
from hasten.runtime import OnnxRuntime, predict_logits
from hasten.smoothing import channel_peaks, smooth, smoothing_scales
from hasten.variant import Variant, building, open_variant, seal
from hasten.workload import Workload

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
        smooth(graph, products(source), channel_peaks(graph, products(source), feeds), 0.7)

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


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, float("nan")])
def test_a_strength_out_of_range_is_refused(smoothing: float) -> None:
    with pytest.raises(UsageError, match="smoothing is a share"):
        QuantizeOptions(smoothing=smoothing)


def test_no_text_to_calibrate_on_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 text"):
        QuantizeOptions(calibration_texts=0)


def test_the_search_smooths_where_the_loss_is_not_shown_to_be_allowed(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from hasten.quantization_search import SMOOTHINGS, Question, choose_quantization

    source = with_graph(exported("bert", checkpoint, tmp_path), tmp_path / "outliers", outliers)
    answers = predict_logits(OnnxRuntime(source, threads=1), TEXTS).argmax(-1)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=tuple(int(label) for label in answers))
    question = Question(
        source=source, texts=TEXTS, valid=valid, options=QuantizeOptions(), max_lost_points=0.3, threads=1
    )  # fmt: skip
    choice = choose_quantization(question)
    tried = [candidate.options.smoothing for candidate in choice.candidates]
    assert tuple(sorted(set(tried))) == (0.0, *SMOOTHINGS)  # 40 texts cannot show that 0.3 points are not lost
    least = min(choice.candidates, key=lambda candidate: candidate.mean_logit_difference)
    assert least.options.smoothing > 0


@pytest.mark.parametrize(("plain", "smoothed"), [(1.0, 0.2), (0.2, 1.0)])
def test_where_neither_decides_the_smaller_estimate_is_taken(
    plain: float, smoothed: float, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.quantization_search import Question, choose_quantization

    def lost(_search: Any, options: QuantizeOptions) -> Interval:
        return Interval(value=smoothed if options.smoothing else plain, lower=-1.0, upper=2.0)

    monkeypatch.setattr("hasten.quantization_search._Search._lost_points", lost)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=(0,) * len(TEXTS))
    source = exported("bert", checkpoint, tmp_path)
    choice = choose_quantization(Question(
        source=source, texts=TEXTS[:5], valid=valid, options=QuantizeOptions(), max_lost_points=0.3, threads=1
    ))  # fmt: skip
    assert (choice.loss, choice.lost_points.value) == ("undecided", 0.2)
    assert bool(choice.options.smoothing) == (smoothed < plain)
