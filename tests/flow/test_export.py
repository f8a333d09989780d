"""Export against its oracle: PyTorch, on padded batches of mixed lengths, for every architecture hasten takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from transformers import AutoConfig

from conftest import FILLER, SPECIAL, labelled_rows
from hasten.checkpoint import ARCHITECTURES, import_checkpoint
from hasten.errors import ArtifactError, DataError, ParityError
from hasten.golden import replay_golden
from hasten.onnx_export import ExportOptions, export
from hasten.onnx_fusion import OPERATORS, require_fused
from hasten.quantization import QuantizeOptions, products, quantize
from hasten.quantization_search import Question, choose_quantization
from hasten.runtime import open_runtime, predict_logits
from hasten.tokenization import Encoding
from hasten.variant import Variant, open_variant
from hasten.workload import Workload

ALIKE = {"camembert": "roberta"}
LARGEST_BATCH = 16
TEXTS = [text for text, _ in labelled_rows(40, seed=5)] + ["good", " ".join(FILLER * 6)]


@pytest.fixture(scope="module")
def bert(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Variant, Variant]:
    folder = tmp_path_factory.mktemp("bert-variants")
    source = import_checkpoint(str(checkpoint("bert")), folder / "torch-fp32")
    return source, export(source, folder / "onnx-fp32", texts=TEXTS)


def padded_logits(variant: Variant, batch: int) -> np.ndarray:
    """Logits with texts batched in their given order, so that short and long ones are padded together."""
    runtime = open_runtime(variant)
    encodings = runtime.encode(TEXTS)
    return np.concatenate([runtime.infer(encodings[i : i + batch]) for i in range(0, len(TEXTS), batch)])


def mixed_batches(longest: int) -> list[list[Encoding]]:
    """Batches of every size up to the largest, in which every length of 1 to `longest` tokens stands once or more."""
    generator = np.random.default_rng(7)
    rows = LARGEST_BATCH * (LARGEST_BATCH + 1) // 2
    lengths = [*range(1, longest + 1), *generator.integers(1, longest + 1, rows - longest)]
    generator.shuffle(lengths)
    sizes = [[int(length) for length in lengths[n * (n - 1) // 2 :][:n]] for n in range(1, LARGEST_BATCH + 1)]
    return [[random_row(generator, n) for n in batch] for batch in [[1], [longest], [1, longest], *sizes]]


def random_row(generator: np.random.Generator, tokens: int) -> Encoding:
    return Encoding(ids=generator.integers(len(SPECIAL), 60, tokens).tolist(), type_ids=[0] * tokens)


def constant_nodes(variant: Variant) -> list[str]:
    """Nodes that compute the same for every text; quantized, onnxruntime does not work them out in advance."""
    graph = onnx.load(variant.path / "model.onnx").graph
    constants = {initializer.name for initializer in graph.initializer}
    return [node.name for node in graph.node if set(node.input) <= constants]


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - set(ALIKE)))
def test_export_equals_pytorch_on_padded_batches(
    architecture: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = import_checkpoint(str(checkpoint(architecture)), tmp_path / "torch-fp32")
    exported = export(source, tmp_path / "onnx-fp32", texts=TEXTS)
    oracle, runtime = open_runtime(source), open_runtime(exported)
    batches = mixed_batches(source.manifest.max_tokens)
    assert {len(row) for batch in batches for row in batch} == set(range(1, source.manifest.max_tokens + 1))
    assert all(len({len(row) for row in batch}) > 1 for batch in batches if len(batch) > 1), "padding in every batch"
    alone = [np.concatenate([oracle.infer([row]) for row in batch]) for batch in batches]
    assert np.ptp(np.concatenate(alone), axis=0).max() > 0.01, "the random model must tell texts apart"
    for batch, unpadded in zip(batches, alone, strict=True):
        logits = runtime.infer(batch)
        np.testing.assert_allclose(logits, oracle.infer(batch), rtol=0, atol=1e-4)
        np.testing.assert_allclose(logits, unpadded, rtol=0, atol=1e-4)
    assert constant_nodes(exported) == []
    require_all_fused(exported)
    assert exported.manifest.step.facts["parity"]["max_logit_difference"] <= 1e-4
    assert exported.manifest.step.parent == source.digest
    assert replay_golden(open_variant(tmp_path / "onnx-fp32")) <= 1e-5


def test_export_is_reproducible_and_holds_no_paths(bert: tuple[Variant, Variant], tmp_path: Path) -> None:
    source, exported = bert
    again = export(source, tmp_path / "again", texts=TEXTS)
    assert again.manifest.files["model.onnx"] == exported.manifest.files["model.onnx"]
    assert b".py" not in (exported.path / "model.onnx").read_bytes()


def test_exported_graph_has_the_promised_interface(bert: tuple[Variant, Variant]) -> None:
    import onnxruntime as ort

    session = ort.InferenceSession(str(bert[1].path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert {node.name for node in session.get_inputs()} == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(isinstance(axis, str) for node in session.get_inputs() for axis in node.shape)
    assert [node.name for node in session.get_outputs()] == ["logits"]


def test_every_layer_is_fused(bert: tuple[Variant, Variant]) -> None:
    facts = bert[1].manifest.step.facts
    assert facts["fused"] == {"query-key-value product": 2, "attention": 2, "normalised sum": 5, "activation": 2}
    assert facts["not_fused"] == []
    graph = onnx.load(bert[1].path / "model.onnx").graph
    assert len(graph.node) <= 40, "the mask is handed to the attention as it is, without a graph of its own"
    counts = Counter(node.op_type for node in graph.node)
    assert (counts["Attention"], counts["MatMul"]) == (2, 2 * 3), "the product of the attention is part of it"


def test_onnxruntime_leaves_sums_and_normalisations_apart(bert: tuple[Variant, Variant], tmp_path: Path) -> None:
    """Its kernel for the two in one is several times slower, and it makes one of them wherever it can."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(bert[1].path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    loaded = Counter(node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node)
    assert loaded["SkipLayerNormalization"] == 0
    assert loaded["Sum"] == loaded["LayerNormalization"] == 5


def require_all_fused(variant: Variant) -> None:
    """A graph that lost any one of the operators that make it fast is refused, by the operator's name."""
    graph, config = onnx.load(variant.path / "model.onnx"), AutoConfig.from_pretrained(variant.path)
    assert require_fused(graph, config)["fused"] == variant.manifest.step.facts["fused"]
    left = variant.manifest.step.facts["not_fused"]
    assert set(OPERATORS) - set(left) >= {"query-key-value product", "normalised sum"}
    for what in set(OPERATORS) - set(left):
        lesser = onnx.ModelProto.FromString(graph.SerializeToString())
        counted = [n for n in lesser.graph.node if n.op_type in OPERATORS[what] or any(
            mark in n.name for mark in OPERATORS[what] if "/" in mark
        )]  # fmt: skip
        lesser.graph.node.remove(counted[0])
        with pytest.raises(ArtifactError, match=rf"has {len(counted) - 1} fused operators for the .* call for"):
            require_fused(lesser, config)


def test_variant_folder_opens_in_transformers(bert: tuple[Variant, Variant]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source, _ = bert
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    model = AutoModelForSequenceClassification.from_pretrained(source.path).eval()
    with torch.inference_mode():
        batch = tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True)
        logits = model(**batch).logits.numpy()
    np.testing.assert_allclose(predict_logits(open_runtime(source), TEXTS), logits, atol=1e-5)
    assert [model.config.id2label[i] for i in range(3)] == list(source.labels)


def test_an_unfaithful_export_is_refused(bert: tuple[Variant, Variant], tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="differs by"):
        export(bert[0], tmp_path / "strict", ExportOptions(tolerance=0.0), texts=TEXTS)
    assert list(tmp_path.iterdir()) == []


def test_only_torch_variants_are_exported(bert: tuple[Variant, Variant], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="only torch variants"):
        export(bert[1], tmp_path / "x")


@pytest.mark.parametrize(
    ("options", "invariant"),
    [
        (QuantizeOptions(), True),
        (QuantizeOptions(calibration="percentile"), True),
        (QuantizeOptions(calibration="entropy", calibration_texts=2), True),
        (QuantizeOptions(method="dynamic"), False),
    ],
    ids=["minmax", "percentile", "entropy", "dynamic"],
)
def test_only_static_int8_is_batch_invariant(
    bert: tuple[Variant, Variant], tmp_path: Path, options: QuantizeOptions, invariant: bool, capfd: Any
) -> None:
    quantized = quantize(bert[1], tmp_path / "onnx-int8", options, texts=TEXTS)
    measured = quantized.manifest.step.facts["batch_invariance"]
    assert quantized.manifest.batch_invariant == measured["holds"] == invariant
    assert (measured["max_logit_difference"] == 0) == invariant
    alone = predict_logits(open_runtime(quantized), TEXTS)
    assert (np.abs(padded_logits(quantized, 16) - alone).max() <= 1e-5) == invariant
    assert capfd.readouterr().out == ""


def test_products_that_are_kept_stay_in_fp32(bert: tuple[Variant, Variant], tmp_path: Path) -> None:
    every = list(products(bert[1]))
    assert len(every) == 2 * 4
    kept = quantize(bert[1], tmp_path / "mixed", QuantizeOptions(keep=tuple(every[:3])), texts=TEXTS)
    graph = onnx.load(kept.path / "model.onnx").graph
    weights = {initializer.name: initializer.data_type for initializer in graph.initializer}
    types = {node.name: weights.get(node.input[1]) for node in graph.node if len(node.input) > 1}
    assert [types[name] == onnx.TensorProto.FLOAT for name in every] == [True] * 3 + [False] * 5
    with pytest.raises(ArtifactError, match="left to quantize"):
        quantize(bert[1], tmp_path / "none", QuantizeOptions(keep=tuple(every)), texts=TEXTS)


def test_integer_products_hold_their_bias_and_leave_the_residual_path_alone(
    bert: tuple[Variant, Variant], tmp_path: Path
) -> None:
    quantized = quantize(bert[1], tmp_path / "static", texts=TEXTS)
    nodes = onnx.load(quantized.path / "model.onnx").graph.node
    counts = Counter(node.op_type for node in nodes)
    assert (counts["QAttention"], counts["MatMulIntegerToFloat"]) == (2, 2 * 3)
    assert (counts["Gelu"], counts["BiasGelu"]) == (2, 0), "the product before it adds the bias"
    assert counts["DequantizeLinear"] == 3, "those of the embedding tables"
    restored = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    layers = [node for node in nodes if "encoder.layer" in node.name]
    assert not any(restored & set(node.input) for node in layers)
    assert not any(node.op_type == "Add" for node in layers)


def test_the_search_takes_what_moves_logits_least_and_puts_products_back(
    bert: tuple[Variant, Variant], tmp_path: Path
) -> None:
    runtime = open_runtime(bert[1])
    texts = tuple(text for text, _ in labelled_rows(60, seed=9))
    own = tuple(map(int, predict_logits(runtime, texts).argmax(-1)))
    valid = Workload(name="valid", source="", texts=texts, labels=own)
    question = Question(
        source=bert[1], texts=TEXTS, valid=valid, options=QuantizeOptions(), max_lost_points=100.0, threads=1
    )
    easy = choose_quantization(question, tmp_path)
    assert easy.loss == "holds"
    assert {c.options.calibration for c in easy.candidates} == {"minmax", "percentile", "entropy"}
    assert easy.options == min(easy.candidates, key=lambda c: c.mean_logit_difference).options
    assert easy.lost_points.lower <= easy.lost_points.value <= easy.lost_points.upper
    hard = choose_quantization(replace(question, max_lost_points=-1000.0), tmp_path)
    assert hard.loss == "too large"
    assert set(hard.sensitivity) == set(products(bert[1]))
    assert sorted(hard.sensitivity.values(), reverse=True) == list(hard.sensitivity.values())
    assert hard.options.keep == tuple(hard.sensitivity)[:4], "half of the eight products, the worst first"
    level = replace(question, max_lost_points=easy.lost_points.value)
    assert choose_quantization(level, tmp_path).loss == "undecided"
    assert not list(tmp_path.iterdir())


def test_quantization_shrinks_and_measures_its_loss(bert: tuple[Variant, Variant], tmp_path: Path) -> None:
    quantized = quantize(bert[1], tmp_path / "onnx-int8", texts=TEXTS)
    assert quantized.size_bytes < bert[1].size_bytes
    assert quantized.manifest.precision == "int8"
    change = quantized.manifest.step.facts["against_fp32"]
    expected = predict_logits(open_runtime(bert[1]), TEXTS)
    got = predict_logits(open_runtime(quantized), TEXTS)
    assert change["max_logit_difference"] == pytest.approx(float(np.abs(expected - got).max()), rel=1e-3)
    assert 0 < change["max_logit_difference"] < 1.0
    with pytest.raises(ArtifactError, match="only a fp32 ONNX variant"):
        quantize(quantized, tmp_path / "twice", texts=TEXTS)
    with pytest.raises(DataError, match="all 0 given are empty"):
        quantize(bert[1], tmp_path / "none", texts=[])
