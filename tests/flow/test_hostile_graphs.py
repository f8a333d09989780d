"""Graphs that were tampered with and sealed again, so that hashes agree: an error, and nothing half-written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.external_data_helper import set_external_data

from conftest import FILLER, labelled_rows
from hasten.checkpoint import import_checkpoint
from hasten.errors import ArtifactError, DataError, HastenError, ParityError
from hasten.golden import replay_golden
from hasten.onnx_export import export
from hasten.quantization import QuantizeOptions, quantize
from hasten.runtime import open_runtime
from hasten.variant import Variant, open_variant, seal

TEXTS = [text for text, _ in labelled_rows(12, seed=5)]


@pytest.fixture(scope="module")
def exported(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Variant:
    folder = tmp_path_factory.mktemp("bert-onnx")
    source = import_checkpoint(str(checkpoint("bert")), folder / "torch-fp32")
    return export(source, folder / "onnx-fp32", texts=TEXTS)


@pytest.fixture
def folder(exported: Variant, tmp_path: Path) -> Path:
    """A copy to tamper with, beside a file that is none of its business."""
    (tmp_path / "secret.bin").write_bytes(np.ones(4096, np.float32).tobytes())
    return Path(shutil.copytree(exported.path, tmp_path / "variant"))


def resealed(folder: Path, graph: onnx.ModelProto) -> Variant:
    """The folder with another graph, as if it had been made so."""
    manifest = open_variant(folder).manifest
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    seal(folder, manifest)
    return open_variant(folder)


def with_weights_in(graph: onnx.ModelProto, location: str) -> bytes:
    """Takes one of a graph's weights from another file; its content."""
    weight = max(graph.graph.initializer, key=lambda initializer: len(initializer.raw_data))
    content = weight.raw_data
    set_external_data(weight, location=location, offset=0, length=len(content))
    weight.ClearField("raw_data")
    return content


@pytest.mark.parametrize("place", ["absolute", "above", "missing"])
def test_weights_outside_the_folder_are_refused(folder: Path, place: str) -> None:
    secret = folder.parent / "secret.bin"
    location = {"absolute": str(secret), "above": "../secret.bin", "missing": "weights.bin"}[place]
    graph = onnx.load(folder / "model.onnx")
    with_weights_in(graph, location)
    with pytest.raises(ArtifactError, match="cannot load it"):
        open_runtime(resealed(folder, graph))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_weights_that_are_a_link_to_what_lies_outside_are_refused(
    folder: Path, link: Callable[[Path, Path], None]
) -> None:
    manifest, secret = open_variant(folder).manifest, folder.parent / "secret.bin"
    graph = onnx.load(folder / "model.onnx")
    secret.write_bytes(with_weights_in(graph, "weights.bin"))
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    link(secret, folder / "weights.bin")
    assert "weights.bin" in seal(folder, manifest).files  # with the hash of what it links to
    with pytest.raises(ArtifactError, match=r"weights.bin: no file of an ONNX variant"):
        open_variant(folder)


@pytest.mark.parametrize(("link", "says"), [(os.symlink, "points outside"), (os.link, "sha256 differs")])
def test_a_link_to_what_lies_outside_is_refused(folder: Path, link: Callable[[Path, Path], None], says: str) -> None:
    """A hard link is the file itself, so what is written through it from outside shows in its hash."""
    manifest, secret = open_variant(folder).manifest, folder.parent / "secret.json"
    (folder / "tokenizer_config.json").rename(secret)
    link(secret, folder / "tokenizer_config.json")
    seal(folder, manifest)
    secret.write_bytes(b"changed")
    with pytest.raises(ArtifactError, match=says):
        open_variant(folder)


def test_an_operator_of_another_domain_is_refused(folder: Path) -> None:
    graph = onnx.load(folder / "model.onnx")
    graph.graph.node[0].domain = "com.example"
    graph.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(ArtifactError, match="cannot load it"):
        open_runtime(resealed(folder, graph))


def test_weights_that_are_no_numbers_are_refused(folder: Path, tmp_path: Path) -> None:
    graph = onnx.load(folder / "model.onnx")
    weight = max(graph.graph.initializer, key=lambda initializer: len(initializer.raw_data))
    broken = numpy_helper.to_array(weight).copy()
    broken[:] = np.nan
    weight.CopyFrom(numpy_helper.from_array(broken, weight.name))
    source = resealed(folder, graph)
    with pytest.raises(ParityError, match="NaN"):
        quantize(source, tmp_path / "onnx-int8", texts=TEXTS)
    assert not list(tmp_path.glob("*int8*"))


@pytest.mark.parametrize("tenth", range(1, 10))
def test_truncated_and_flipped_files_are_refused(folder: Path, tenth: int) -> None:
    path = folder / "model.onnx"
    whole = path.read_bytes()
    at = len(whole) * tenth // 10
    manifest = open_variant(folder).manifest
    for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="sha256 differs"):
            open_variant(folder)
    path.write_bytes(whole[:at])
    seal(folder, manifest)
    with pytest.raises(HastenError):
        replay_golden(open_variant(folder))


def test_the_longest_calibration_texts_still_give_numbers(exported: Variant, tmp_path: Path) -> None:
    made = quantize(exported, tmp_path / "onnx-int8", texts=[" ".join(FILLER * 6), "good"])
    assert made.manifest.batch_invariant
    assert replay_golden(made) <= 1e-5


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["one"], "all 1 are the same text"),
        (["good"] * 3, "all 3 are the same text"),
        (["東京は今日も晴れ", "Привет, мир", "good"], r"67% of the tokens to calibrate on are unknown"),
    ],
    ids=["one row", "one text", "another script"],
)
def test_calibration_texts_that_tell_nothing_are_refused(
    exported: Variant, tmp_path: Path, texts: list[str], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        quantize(exported, tmp_path / "onnx-int8", texts=texts)
    assert list(tmp_path.iterdir()) == []
    made = quantize(exported, tmp_path / "dynamic", QuantizeOptions(method="dynamic"), texts=texts)
    assert replay_golden(made) <= 1e-5


def test_empty_calibration_texts_are_refused(exported: Variant, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 2 given are empty"):
        quantize(exported, tmp_path / "onnx-int8", texts=["", " "])
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_does_not_go_with_its_labels_or_inputs_is_refused(folder: Path) -> None:
    manifest = open_variant(folder).manifest
    seal(folder, replace(manifest, labels=[*manifest.labels, "another"]))
    with pytest.raises(ArtifactError, match="where a classifier of 4 labels takes"):
        replay_golden(open_variant(folder))
    seal(folder, manifest)
    graph = onnx.load(folder / "model.onnx")
    graph.graph.input[0].name = "words"
    for node in graph.graph.node:
        node.input[:] = ["words" if name == "input_ids" else name for name in node.input]
    with pytest.raises(ArtifactError, match="its graph takes words"):
        open_runtime(resealed(folder, graph))


def test_golden_logits_of_another_shape_are_refused(folder: Path) -> None:
    manifest = open_variant(folder).manifest
    golden = msgspec.json.decode((folder / "golden.json").read_bytes())
    for changes in ({"texts": [], "logits": []}, {"logits": golden["logits"][:1]}):
        (folder / "golden.json").write_bytes(msgspec.json.encode(golden | changes))
        seal(folder, manifest)
        with pytest.raises(ArtifactError, match="were recorded, it gives"):
            replay_golden(open_variant(folder))
