"""Rounding in the loop, against onnxruntime's rounding and against what it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conftest import labelled_rows
from hasten.checkpoint import import_checkpoint
from hasten.distillation import distill
from hasten.onnx_export import export
from hasten.quantization import QuantizeOptions, quantize
from hasten.rounding import round_weights, rounded_products
from hasten.runtime import open_runtime, predict_logits
from hasten.teaching import DistillOptions, Lesson
from hasten.torch_runtime import load_torch_model
from hasten.torch_training import TrainingSet, TrainOptions
from hasten.variant import Variant, open_variant
from hasten.workload import Workload

TEXTS = [text for text, _ in labelled_rows(48, seed=3)]
MATRICES = hnp.arrays(np.float32, (3, 5), elements=st.floats(-4, 4, width=32))


@given(MATRICES, st.sampled_from([63, 127]))
def test_weights_are_rounded_by_output_channel(weights: np.ndarray, steps: int) -> None:
    found = round_weights(torch.from_numpy(weights), steps).numpy()
    scales = np.maximum(np.abs(weights).max(axis=1, keepdims=True), 1e-8) / steps
    np.testing.assert_allclose(found / scales, np.rint(found / scales), atol=1e-3)
    assert (np.abs(found - weights) <= 0.5001 * scales + 1e-12).all()


@pytest.fixture(scope="module")
def bert(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return import_checkpoint(str(checkpoint("bert")), tmp_path_factory.mktemp("rounding") / "torch-fp32")


def test_products_round_within_the_block_and_nowhere_else(bert: Variant) -> None:
    model = load_torch_model(bert)
    data = TrainingSet.of(bert, model, TEXTS)
    inputs = data.inputs(range(4))
    with torch.inference_mode():
        before = model(**inputs).logits
    with rounded_products(model, data, weight_bits=8):
        rounded = model(**inputs).logits
        rounded.square().sum().backward()
    with torch.inference_mode():
        after = model(**inputs).logits
    assert torch.equal(before, after)
    assert 0 < (rounded.detach() - before).abs().max() < 0.1
    query = next(weight for name, weight in model.named_parameters() if "query.weight" in name)
    assert query.grad.abs().sum() > 0


def test_what_is_rounded_answers_as_the_int8_variant_does(bert: Variant, tmp_path: Path) -> None:
    """The same weights, rounded in the loop and quantized by onnxruntime with the same ranges."""
    model = load_torch_model(bert)
    data = TrainingSet.of(bert, model, TEXTS)
    options = QuantizeOptions(reduce_range=True, embeddings=False)
    source = export(bert, tmp_path / "onnx", texts=TEXTS[:8])
    int8 = predict_logits(open_runtime(quantize(source, tmp_path / "int8", options, texts=TEXTS)), TEXTS)
    with rounded_products(model, data, weight_bits=7), torch.inference_mode():
        rounded = np.concatenate([model(**data.inputs([row])).logits.numpy() for row in range(len(TEXTS))])
    exact = predict_logits(open_runtime(bert), TEXTS)
    assert np.abs(rounded - int8).mean() < 0.5 * np.abs(exact - int8).mean()


def test_a_student_is_trained_with_it(bert: Variant, tmp_path: Path) -> None:
    rows = labelled_rows(64, seed=4)
    data = Workload(
        name="train", source="", texts=tuple(text for text, _ in rows), labels=tuple(len(text) % 2 for text, _ in rows)
    )
    options = DistillOptions(force=True, train=TrainOptions(epochs=2, learning_rate=1e-3))
    made = {}
    for bits in (None, 7, 8):
        name = f"student-{bits}"
        distill(
            bert, tmp_path / name, replace(options, rounding_bits=bits), name=name,
            lesson=Lesson(data=data, teacher=bert), work=tmp_path / f"{name}-work",
        )  # fmt: skip
        made[bits] = open_variant(tmp_path / name)
    assert len({variant.digest for variant in made.values()}) == 3
    assert made[7].manifest.step.options["rounding_bits"] == 7
