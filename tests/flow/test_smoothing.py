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
from hasten.intervals import Interval
from hasten.onnx_export import export
from hasten.packing import unpack
from hasten.quantization import QuantizeOptions, products, quantize, smoothed_by_operators
from hasten.runtime import OnnxRuntime, open_runtime, predict_logits
from hasten.smoothing import channel_peaks, smooth, smoothing_scales
from hasten.variant import PlanRow, ThreadPlan, Variant, building, open_variant, seal
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


def test_an_answer_that_is_never_right_loses_no_share(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from hasten.quantization_search import Question, choose_quantization

    source = exported("bert", checkpoint, tmp_path)
    answers = predict_logits(OnnxRuntime(source, threads=1), TEXTS).argmax(-1)
    wrong = tuple(int(label + 1) % len(source.labels) for label in answers)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=wrong)
    choice = choose_quantization(Question(
        source=source, texts=TEXTS[:5], valid=valid, options=QuantizeOptions(), max_lost_points=0.3, threads=1
    ), tmp_path)  # fmt: skip
    assert (choice.loss, choice.lost_points.lower, choice.lost_points.upper) == ("undecided", None, None)


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


@pytest.mark.parametrize(("points_lost", "smooths"), [(0.5, True), (0.3, False), (0.0, False)])
def test_the_search_smooths_where_more_is_lost_than_allowed_by_the_estimate(
    points_lost: float, smooths: bool, checkpoint: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from hasten.quantization_search import SMOOTHINGS, Question, choose_quantization

    def lost(_search: Any, _options: QuantizeOptions) -> Interval:
        return Interval(value=points_lost, lower=-1.0, upper=2.0)

    monkeypatch.setattr("hasten.quantization_search._Search._lost_points", lost)
    source = with_graph(exported("bert", checkpoint, tmp_path), tmp_path / "outliers", outliers)
    answers = predict_logits(OnnxRuntime(source, threads=1), TEXTS).argmax(-1)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=tuple(int(label) for label in answers))
    question = Question(
        source=source, texts=TEXTS, valid=valid, options=QuantizeOptions(), max_lost_points=0.3, threads=1
    )  # fmt: skip
    choice = choose_quantization(question, tmp_path)
    tried = [candidate.options.smoothing for candidate in choice.candidates]
    assert tuple(sorted(set(tried))) == ((0.0, *SMOOTHINGS) if smooths else (0.0,))
    least = min(choice.candidates, key=lambda candidate: candidate.mean_logit_difference)
    assert (least.options.smoothing > 0) == smooths


@pytest.mark.parametrize(("plain", "smoothed"), [(1.0, 0.4), (0.4, 1.0)])
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
    ), tmp_path)  # fmt: skip
    assert (choice.loss, choice.lost_points.value) == ("undecided", 0.4)
    assert bool(choice.options.smoothing) == (smoothed < plain)


@pytest.mark.parametrize(
    ("of_all", "of_fewer", "further", "takes_fewer"),
    [
        (0.2, 0.3, 2.0, True),  # loses no more than allowed
        (0.5, 0.5, 2.0, True),  # no more than all of them smoothed
        (0.2, 0.31, 2.0, False),
        (0.5, 0.6, 2.0, False),
        (0.5, 0.6, 1.1, True),  # neither is allowed, and the logits are as near
        (0.2, 0.6, 1.1, False),
        (0.5, 1.0, 1.1, False),  # no better than without smoothing
        (0.5, 2.0, 1.0, False),  # shown to be too large
    ],
)
def test_no_more_products_are_smoothed_than_it_takes(
    of_all: float, of_fewer: float, further: float, takes_fewer: bool, checkpoint: Callable[[str], Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from hasten.quantization_search import Candidate, Question, _Search, choose_quantization

    def lost(_search: _Search, options: QuantizeOptions) -> Interval:
        value = (of_all if options.smoothed is None else of_fewer) if options.smoothing else 1.0
        return Interval(value=value, lower=value - 1.5, upper=value + 1.5)

    def candidate(search: _Search, options: QuantizeOptions) -> Candidate:
        move = 1.0 if options.smoothed is None else further
        return replace(as_it_is(search, options), mean_logit_difference=move / (options.smoothing + 0.1))

    as_it_is = _Search._candidate
    monkeypatch.setattr(_Search, "_lost_points", lost)
    monkeypatch.setattr(_Search, "_candidate", candidate)
    source = with_graph(exported("bert", checkpoint, tmp_path), tmp_path / "outliers", outliers)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=(0,) * len(TEXTS))
    choice = choose_quantization(Question(
        source=source, texts=TEXTS, valid=valid, options=QuantizeOptions(), max_lost_points=0.3, threads=1
    ), tmp_path)  # fmt: skip
    fewer = choice.candidates[-1].options
    assert {candidate.options.smoothed for candidate in choice.candidates[:-1]} == {None}
    assert fewer.smoothed == ()  # with such an error of all of them, none would add to it
    assert choice.options == (fewer if takes_fewer else replace(fewer, smoothed=None))
    assert choice.lost_points.value == (of_fewer if takes_fewer else of_all)
    assert next(iter(choice.sensitivity)).endswith("qkv_0")


def test_the_products_that_are_smoothed_are_those_whose_error_tells(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.quantization_search import SPARED, Question, _Search, choose_quantization

    def lost(_search: _Search, options: QuantizeOptions) -> Interval:
        value = 0.0 if options.smoothing else 1.0
        return Interval(value=value, lower=value - 1.5, upper=value + 1.5)

    monkeypatch.setattr(_Search, "_lost_points", lost)
    source = with_graph(exported("bert", checkpoint, tmp_path), tmp_path / "outliers", outliers)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=(0,) * len(TEXTS))
    choice = choose_quantization(Question(
        source=source, texts=TEXTS, valid=valid, options=QuantizeOptions(), max_lost_points=0.3, threads=1
    ), tmp_path)  # fmt: skip
    plain, *smoothed, fewer = choice.candidates
    of_all = min(way.mean_logit_difference for way in smoothed if way.options.smoothing)
    worst, *_ = choice.sensitivity
    dear = smoothed_by_operators(source)
    assert choice.options.smoothed == fewer.options.smoothed == (worst,)
    rest = np.array([move for name, move in choice.sensitivity.items() if name in dear - {worst}])
    assert np.hypot(of_all, np.linalg.norm(rest)) <= (1 + SPARED) * of_all < np.hypot(of_all, choice.sensitivity[worst])
    assert fewer.mean_logit_difference <= (1 + SPARED) * of_all
    assert of_all < 0.5 * plain.mean_logit_difference


@pytest.mark.parametrize(
    ("way", "interval", "line"),
    [
        (
            QuantizeOptions(reduce_range=False), Interval(value=0.6, lower=-0.021, upper=1.4),
            "ranges by minmax, weights of 8 bits; 0.60 points lost on the validation split (-0.02 to 1.40): undecided",
        ),
        (
            QuantizeOptions(reduce_range=True, calibration="entropy", smoothing=0.5, smoothed=("a", "b"), keep=("c",)),
            Interval(value=-1.0, lower=None, upper=None),
            "ranges by entropy, weights of 7 bits, smoothing 0.5 before the products that tell (2), "
            "products in fp32: 1; -1.00 points lost on the validation split: undecided",
        ),
        (
            QuantizeOptions(reduce_range=False, smoothing=0.8), Interval(value=0.0, lower=0.0, upper=0.0),
            "ranges by minmax, weights of 8 bits, smoothing 0.8 before every product; "
            "0.00 points lost on the validation split (0.00 to 0.00): undecided",
        ),
    ],
)  # fmt: skip
def test_a_choice_reads_as_a_line(way: QuantizeOptions, interval: Interval, line: str) -> None:
    from hasten.quantization_search import Choice

    assert str(Choice(options=way, lost_points=interval, loss="undecided", candidates=[], sensitivity={})) == line


def test_products_go_back_to_fp32_one_by_one_until_the_loss_is_allowed(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten import quantization_search
    from hasten.quantization_search import Question, choose_quantization

    def lost(_search: Any, options: QuantizeOptions) -> Interval:
        healed = len(options.keep) >= 2
        return Interval(value=0.1, lower=-0.1, upper=0.2) if healed else Interval(value=5.0, lower=4.0, upper=6.0)

    monkeypatch.setattr(quantization_search, "CALIBRATIONS", ("minmax",))
    monkeypatch.setattr(quantization_search._Search, "_lost_points", lost)
    valid = Workload(name="valid", source="valid", texts=tuple(TEXTS), labels=(0,) * len(TEXTS))
    source = exported("bert", checkpoint, tmp_path)
    choice = choose_quantization(Question(
        source=source, texts=TEXTS[:5], valid=valid, options=QuantizeOptions(), max_lost_points=0.3, threads=1
    ), tmp_path)  # fmt: skip
    assert (choice.loss, choice.options.keep) == ("holds", tuple(choice.sensitivity)[:2])


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
