"""OpenVINO as the second runtime, against its oracles: PyTorch for the export, the fp32 parent for INT8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import labelled_rows
from hasten.breakdown import breakdown
from hasten.budget import Budget
from hasten.checkpoint import import_checkpoint
from hasten.errors import ArtifactError, DataError, MissingExtraError
from hasten.golden import Golden, replay_golden
from hasten.openvino_steps import export_openvino, quantize_openvino
from hasten.optimize_options import OptimizeOptions
from hasten.pipeline import Inputs, optimize
from hasten.profiling import ProfileOptions
from hasten.runtime import open_runtime, predict_logits
from hasten.variant import Variant, open_variant

TEXTS = [text for text, _ in labelled_rows(40, seed=6)]


@pytest.fixture(scope="module")
def bert(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Variant, Variant]:
    folder = tmp_path_factory.mktemp("openvino")
    source = import_checkpoint(str(checkpoint("bert")), folder / "torch-fp32")
    return source, export_openvino(source, folder / "openvino-fp32", texts=TEXTS)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_export_equals_pytorch(bert: tuple[Variant, Variant], batch: int) -> None:
    expected, got = (predict_logits(open_runtime(variant), TEXTS, batch=batch) for variant in bert)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert bert[1].manifest.step.facts["parity"]["max_logit_difference"] <= 1e-4


def test_no_view_computes_its_shape(bert: tuple[Variant, Variant]) -> None:
    import openvino

    model = openvino.Core().read_model(bert[1].path / "openvino_model.xml")
    views = [node for node in model.get_ops() if node.get_type_name() == "Reshape"]
    assert views
    assert {view.input(1).get_source_output().get_node().get_type_name() for view in views} == {"Constant"}


def test_folder_is_laid_out_as_optimum_intel_does(bert: tuple[Variant, Variant]) -> None:
    import openvino

    variant = open_variant(bert[1].path)
    assert variant.weights == "openvino_model.xml"
    assert {"openvino_model.xml", "openvino_model.bin", "config.json", "tokenizer.json"} <= set(variant.manifest.files)
    assert variant.size_bytes > (variant.path / "openvino_model.bin").stat().st_size
    model = openvino.Core().read_model(variant.path / variant.weights)
    assert {node.any_name for node in model.inputs} == {"input_ids", "attention_mask", "token_type_ids"}
    assert [node.any_name for node in model.outputs] == ["logits"]


def test_golden_logits_name_the_runtime(bert: tuple[Variant, Variant]) -> None:
    import msgspec

    golden = msgspec.json.decode((bert[1].path / "golden.json").read_bytes(), type=Golden)
    assert set(golden.machine.versions) == {"openvino", "tokenizers", "tokie"}
    assert replay_golden(bert[1], threads=2) <= 1e-4


def test_int8_is_small_faithful_and_the_same_in_company(trained: Path, tmp_path: Path) -> None:
    source = import_checkpoint(str(trained), tmp_path / "torch-fp32")
    exported = export_openvino(source, tmp_path / "openvino-fp32", texts=TEXTS)
    made = quantize_openvino(exported, tmp_path / "openvino-int8", texts=TEXTS)
    facts = made.manifest.step.facts
    assert made.manifest.precision == "int8"
    assert (made.path / "openvino_model.bin").stat().st_size < (exported.path / "openvino_model.bin").stat().st_size
    assert facts["against_fp32"]["mean_logit_difference"] > 0
    assert facts["against_fp32"]["label_flips"] <= 4
    assert made.manifest.batch_invariant is facts["batch_invariance"]["holds"]


def test_threads_ask_at_the_same_time_and_get_their_own_answers(bert: tuple[Variant, Variant]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    runtime = open_runtime(bert[1], threads=1, workers=2)
    expected = predict_logits(runtime, TEXTS)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda text: runtime.infer(runtime.encode([text]))[0], TEXTS * 5))
    np.testing.assert_allclose(np.stack(found), np.tile(expected, (5, 1)), atol=1e-5)


def test_breakdown_finds_the_layers(bert: tuple[Variant, Variant]) -> None:
    times = breakdown(bert[1], TEXTS, threads=1)
    assert min(times[group] for group in ("tokenizer", "attention", "feed-forward")) > 0
    assert times["other"] < sum(times.values()) / 2


def test_other_formats_are_refused(bert: tuple[Variant, Variant], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="only torch variants"):
        export_openvino(bert[1], tmp_path / "x")
    with pytest.raises(ArtifactError, match="a torch fp32 variant"):
        quantize_openvino(bert[0], tmp_path / "x", texts=TEXTS)
    with pytest.raises(DataError, match="are empty"):
        quantize_openvino(bert[1], tmp_path / "x", texts=["", " "])
    assert not list(tmp_path.iterdir())


def test_a_damaged_model_is_refused(bert: tuple[Variant, Variant], tmp_path: Path) -> None:
    for path in bert[1].path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "openvino_model.xml").write_text("<net")
    with pytest.raises(ArtifactError, match="sha256 differs"):
        open_variant(tmp_path)
    with pytest.raises(ArtifactError, match="OpenVINO cannot load it"):
        open_runtime(replace(bert[1], path=tmp_path))


def test_without_the_extra_it_says_what_to_install(
    bert: tuple[Variant, Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"hasten\[openvino\]"):
        open_runtime(bert[1])


def test_nothing_is_reported_to_anybody(tmp_path: Path) -> None:
    code = (
        "import hasten.openvino_steps as steps\n"
        "with steps._quiet_nncf():\n"
        "    from nncf.telemetry.wrapper import NNCFTelemetryStub, telemetry\n"
        "    assert isinstance(telemetry, NNCFTelemetryStub), telemetry\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "NNCF_CI")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment | {"HOME": str(tmp_path)})
    assert not list(tmp_path.rglob("*"))


def test_the_road_has_its_rows_and_the_chosen_one_a_plan(trained: Path, data: dict[str, str], tmp_path: Path) -> None:
    inputs = Inputs(model=str(trained), train=data["train"], test=data["test"], command="hasten optimize …")
    options = OptimizeOptions(
        budget=Budget(speedup=1.01, retain=0.5, gate="point"), openvino=True,
        profile=ProfileOptions(samples=30, breakdown_samples=2),
    )  # fmt: skip
    optimize(inputs, tmp_path / "out", options)
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "report.json").read_text())["variants"]}
    ours = {name for name, row in rows.items() if row["format"] == "openvino"}
    assert "openvino-fp32" in ours
    assert open_variant(tmp_path / "out" / "chosen").manifest.plan is not None
