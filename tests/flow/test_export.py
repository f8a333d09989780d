"""Export against its oracle: PyTorch, on padded batches of mixed lengths, for every architecture hasten takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import FILLER, labelled_rows
from hasten.checkpoint import ARCHITECTURES, import_checkpoint
from hasten.errors import ArtifactError, DataError, ParityError
from hasten.onnx_export import ExportOptions, export
from hasten.quantization import quantize
from hasten.runtime import open_runtime, predict_logits, replay_golden
from hasten.variant import Variant, open_variant

ALIKE = {"camembert": "roberta", "xlm-roberta": "roberta"}
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


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - set(ALIKE)))
def test_export_equals_pytorch_on_padded_batches(
    architecture: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = import_checkpoint(str(checkpoint(architecture)), tmp_path / "torch-fp32")
    exported = export(source, tmp_path / "onnx-fp32", texts=TEXTS)
    expected = padded_logits(source, 1)
    assert np.ptp(expected, axis=0).max() > 0.01, "the random model must tell texts apart"
    for batch in (1, 3, 16):
        np.testing.assert_allclose(padded_logits(exported, batch), expected, atol=1e-4)
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
    assert bert[1].manifest.step.facts["fused"]["SkipLayerNormalization"] == 4
    assert bert[1].manifest.step.facts["fused"]["BiasGelu"] == 2


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


def test_quantization_shrinks_and_measures_its_loss(bert: tuple[Variant, Variant], tmp_path: Path) -> None:
    quantized = quantize(bert[1], tmp_path / "onnx-int8", texts=TEXTS)
    assert quantized.size_bytes < bert[1].size_bytes
    assert quantized.manifest.precision == "int8"
    assert not quantized.manifest.batch_invariant
    change = quantized.manifest.step.facts["against_fp32"]
    expected = predict_logits(open_runtime(bert[1]), TEXTS)
    got = predict_logits(open_runtime(quantized), TEXTS)
    assert change["max_logit_difference"] == pytest.approx(float(np.abs(expected - got).max()), rel=1e-3)
    assert 0 < change["max_logit_difference"] < 1.0
    with pytest.raises(ArtifactError, match="only a fp32 ONNX variant"):
        quantize(quantized, tmp_path / "twice", texts=TEXTS)
    with pytest.raises(DataError, match="none were given"):
        quantize(bert[1], tmp_path / "none", texts=[])
