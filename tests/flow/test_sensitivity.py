"""Sensitivity: each product is measured as it is in a graph in which nothing else was quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import labelled_rows
from hasten.checkpoint import import_checkpoint
from hasten.errors import ArtifactError
from hasten.onnx_export import export
from hasten.quantization import QuantizeOptions, products, quantize, quantize_graph
from hasten.runtime import OnnxRuntime, predict_logits
from hasten.sensitivity import sensitivities
from hasten.variant import building, copy_configuration, open_variant, seal

TEXTS = [text for text, _ in labelled_rows(20, seed=12)]
MEASURED = TEXTS[:12]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", QuantizeOptions()),
        ("bert", QuantizeOptions(per_channel=False)),
        ("mpnet", QuantizeOptions(smoothing=0.7, reduce_range=True)),
        ("albert", QuantizeOptions()),
        ("albert", QuantizeOptions(smoothing=0.7)),
        ("deberta-v2", QuantizeOptions(smoothing=0.7, embeddings=False)),
        ("modernbert", QuantizeOptions(smoothing=0.7)),
    ],
)
def test_each_product_is_as_sensitive_as_where_it_alone_is_quantized(
    architecture: str, options: QuantizeOptions, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = export(import_checkpoint(str(checkpoint(architecture)), tmp_path / "torch"), tmp_path / "fp32")
    runtime = OnnxRuntime(source, threads=1)
    with building(tmp_path / "plain") as draft:  # as it is before its products become INT8
        copy_configuration(source, draft)
        quantize_graph(source, tmp_path / "int8.onnx", options, TEXTS, plain=draft / "model.onnx")
        seal(draft, source.manifest)
    plain = open_variant(tmp_path / "plain")
    feeds = [runtime.feed([encoding]) for encoding in runtime.encode(MEASURED)]
    found = sensitivities(plain.path / "model.onnx", tmp_path / "int8.onnx", feeds, threads=1)

    every = products(source)
    assert {every[name] for name in found} == {*every.values()}
    assert len(found) == len({*every.values()})  # those of the same weights once
    assert list(found.values()) == sorted(found.values(), reverse=True)
    before = predict_logits(OnnxRuntime(plain, threads=1), MEASURED)
    for name in [*found][:2] + [*found][-1:]:
        others = tuple(other for other in every if every[other] != every[name])
        way = replace(options, keep=others)
        alone = quantize(source, tmp_path / name.replace("/", "-"), way, texts=TEXTS)
        after = predict_logits(OnnxRuntime(alone, threads=1), MEASURED)
        assert found[name] == pytest.approx(float(np.abs(after - before).max(-1).mean()), rel=2e-2, abs=2e-6)


def test_what_was_quantized_dynamically_has_no_such_product(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = export(import_checkpoint(str(checkpoint("bert")), tmp_path / "torch"), tmp_path / "fp32")
    quantize_graph(source, tmp_path / "int8.onnx", QuantizeOptions(method="dynamic"), TEXTS)
    with pytest.raises(ArtifactError, match="no product of the graph became INT8 by the static method"):
        sensitivities(source.path / "model.onnx", tmp_path / "int8.onnx", [], threads=1)
