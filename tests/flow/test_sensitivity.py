"""Sensitivity: each product is measured as it is in a graph in which nothing else was quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import labelled_rows
from hasten.checkpoint import import_checkpoint
from hasten.onnx_export import export
from hasten.quantization import QuantizeOptions, measure_sensitivities, products, quantize, quantize_graph
from hasten.runtime import OnnxRuntime, predict_logits

TEXTS = [text for text, _ in labelled_rows(20, seed=12)]


@pytest.mark.parametrize("architecture", ["bert", "mpnet", "albert", "deberta-v2"])
@pytest.mark.parametrize("smoothing", [0.0, 0.7])
def test_each_product_is_as_sensitive_as_where_it_alone_is_quantized(
    architecture: str, smoothing: float, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = export(import_checkpoint(str(checkpoint(architecture)), tmp_path / "torch"), tmp_path / "fp32")
    options = QuantizeOptions(embeddings=False, smoothing=smoothing)
    quantize_graph(source, tmp_path / "int8.onnx", options, TEXTS)
    found = measure_sensitivities(source, tmp_path / "int8.onnx", options, TEXTS, measured=12, threads=1)

    every = products(source)
    assert {every[name] for name in found} == {*every.values()}
    assert len(found) == len({*every.values()})  # those of the same weights once
    assert list(found.values()) == sorted(found.values(), reverse=True)
    before = predict_logits(OnnxRuntime(source, threads=1), TEXTS[:12])
    for name in [*found][:2] + [*found][-1:]:
        others = tuple(other for other in every if every[other] != every[name])
        alone = quantize(source, tmp_path / name.replace("/", "-"), QuantizeOptions(
            embeddings=False, keep=others, smoothing=smoothing, smoothed=options.smoothed
        ), texts=TEXTS)  # fmt: skip
        after = predict_logits(OnnxRuntime(alone, threads=1), TEXTS[:12])
        assert found[name] == pytest.approx(float(np.abs(after - before).max(-1).mean()), rel=1e-3, abs=1e-6)
