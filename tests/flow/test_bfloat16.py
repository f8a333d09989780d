"""bfloat16 in OpenVINO: the same graph in another arithmetic, measured against the one it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from conftest import Hasten, labelled_rows, write_csv
from hasten import openvino_runtime, openvino_steps, profiling, quantization_search, student_search
from hasten.breakdown import breakdown
from hasten.budget import Budget
from hasten.checkpoint import import_checkpoint
from hasten.errors import ArtifactError, DataError, UsageError
from hasten.golden import GOLDEN_TOLERANCE, replay_golden
from hasten.onnx_export import export
from hasten.openvino_runtime import has_bfloat16
from hasten.openvino_steps import convert_openvino, export_openvino, quantize_openvino
from hasten.optimize_options import OptimizeOptions
from hasten.pipeline import Inputs, optimize
from hasten.profiling import ProfileOptions
from hasten.profiling_worker import Reply, Request, classify
from hasten.runtime import open_runtime, predict_logits
from hasten.teaching import DistillOptions
from hasten.torch_training import TrainOptions
from hasten.variant import IN_BFLOAT16, WEIGHTS, Precision, Variant, open_variant

TEXTS = [text for text, _ in labelled_rows(40, seed=7)]


@pytest.fixture(scope="module")
def source(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return import_checkpoint(str(trained), tmp_path_factory.mktemp("bfloat16") / "torch-fp32")


@pytest.fixture(scope="module")
def plain(source: Variant) -> dict[Precision, Variant]:
    """What can be converted, by precision."""
    folder = source.path.parent
    fp32 = export_openvino(source, folder / "openvino-fp32", texts=TEXTS)
    return {"fp32": fp32, "int8": quantize_openvino(fp32, folder / "openvino-int8", texts=TEXTS)}


@pytest.fixture(scope="module")
def converted(plain: dict[Precision, Variant]) -> dict[Precision, Variant]:
    """Both in bfloat16, by precision."""
    if not has_bfloat16():
        pytest.skip("OpenVINO does not multiply bfloat16 on this CPU")
    made = (
        convert_openvino(one, one.path.parent / f"{one.name}-bf16", name=f"{one.name}-bf16", texts=TEXTS)
        for one in plain.values()
    )
    return {variant.manifest.precision: variant for variant in made}


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (openvino_runtime, openvino_steps):
        monkeypatch.setattr(module, "has_bfloat16", lambda: False)


def test_the_graph_stays_and_its_answers_are_compared_with_its_sources(
    plain: dict[Precision, Variant], converted: dict[Precision, Variant]
) -> None:
    assert converted.keys() == IN_BFLOAT16.keys()
    for precision, variant in converted.items():
        before = plain[IN_BFLOAT16[precision]]
        assert all(variant.manifest.files[name] == before.manifest.files[name] for name in WEIGHTS["openvino"])
        assert open_variant(variant.path).digest != before.digest
        step = variant.manifest.step
        assert (step.name, step.parent) == ("convert", before.digest)
        changes = step.facts[f"against_{before.manifest.precision}"]
        expected, got = (predict_logits(open_runtime(one, threads=2), TEXTS) for one in (before, variant))
        moved = np.abs(expected - got).max(axis=-1)
        assert 0 < changes["mean_logit_difference"] == pytest.approx(moved.mean(), abs=1e-6)
        assert moved.max() < 0.3
        assert changes["label_flips"] <= 2
        assert variant.manifest.batch_invariant is step.facts["batch_invariance"]["holds"]


@pytest.mark.parametrize("threads", [1, 2])
def test_its_logits_replay_on_one_thread_and_on_two(converted: dict[Precision, Variant], threads: int) -> None:
    assert max(replay_golden(variant, threads=threads) for variant in converted.values()) <= GOLDEN_TOLERANCE / 10


def test_breakdown_finds_the_layers(converted: dict[Precision, Variant]) -> None:
    for variant in converted.values():
        times = breakdown(variant, TEXTS, threads=1)
        assert min(times[group] for group in ("tokenizer", "attention", "feed-forward", "normalisation")) > 0
        assert times["other"] < sum(times.values()) / 3


def test_what_has_it_already_or_is_of_another_runtime_is_refused(
    source: Variant, converted: dict[Precision, Variant], tmp_path: Path
) -> None:
    for other in (source, *converted.values()):
        kind = f"{other.manifest.format} {other.manifest.precision}".replace("+", r"\+")
        with pytest.raises(ArtifactError, match=f"a {kind} variant; only a fp32 or int8 OpenVINO variant can be conv"):
            convert_openvino(other, tmp_path / "x", name="x", texts=TEXTS)
    with pytest.raises(ArtifactError, match="a openvino bf16 variant; only a fp32 OpenVINO variant can be quantized"):
        quantize_openvino(converted["bf16"], tmp_path / "x", texts=TEXTS)
    assert not list(tmp_path.iterdir())


def test_without_texts_there_is_nothing_to_measure(plain: dict[Precision, Variant], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 2 given are empty"):
        convert_openvino(plain["fp32"], tmp_path / "x", name="x", texts=["", " "])


@pytest.mark.usefixtures("without_bfloat16")
def test_a_cpu_without_it_makes_none(plain: dict[Precision, Variant], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not multiply bfloat16 on this CPU; use .*openvino-fp32 as it is"):
        convert_openvino(plain["fp32"], tmp_path / "x", name="x", texts=TEXTS)


@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize("precision", IN_BFLOAT16)
def test_a_cpu_without_it_opens_none(plain: dict[Precision, Variant], precision: Precision, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for path in plain[IN_BFLOAT16[precision]].path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((folder / "variant.json").read_text())
    (folder / "variant.json").write_text(json.dumps(manifest | {"precision": precision}))
    with pytest.raises(ArtifactError, match=rf"on this CPU; use the {IN_BFLOAT16[precision]} variant that it was made"):
        open_runtime(open_variant(folder))


def test_the_command_line_converts_and_verifies(
    hasten: Hasten, converted: dict[Precision, Variant],
    plain: dict[Precision, Variant], data: dict[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    for precision, before in IN_BFLOAT16.items():
        out = tmp_path / precision
        status, made, _ = hasten(
            "quantize", plain[before].path, "--precision", "bf16", "--data", data["train"], "--out", out
        )
        assert (status, made) == (0, f"{out}\n")
        variant = open_variant(out)
        assert (variant.name, variant.manifest.precision) == (precision, converted[precision].manifest.precision)
        assert hasten("verify", out)[0] == 0


def test_the_command_line_says_what_bfloat16_is_for(
    hasten: Hasten, source: Variant, data: dict[str, str], tmp_path: Path
) -> None:
    graph = export(source, tmp_path / "onnx-fp32", texts=TEXTS)
    asked = ("--data", data["train"], "--out", tmp_path / "x", "--precision")
    for other in (graph, source):
        status, _, said = hasten("quantize", other.path, *asked, "bf16")
        assert status == 2
        assert "--precision bf16 is for OpenVINO variants" in said
    status, _, said = hasten("quantize", graph.path, *asked, "fp16")
    assert status == 2
    assert "--precision is 'int8' or 'bf16', not 'fp16'" in said
    assert not (tmp_path / "x").exists()


class InProcess:
    """What `hasten.profiling.Worker` is, without a process."""

    def __init__(self, variant: Variant, threads: int) -> None:
        self.runtime, self.met = open_runtime(variant, threads=threads), set[int]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def classify(self, texts: list[str], *, warmup: int = 0) -> Reply:
        return classify(self.runtime, Request(texts=texts, warmup=warmup), self.met)


def test_the_whole_road_has_its_rows(
    trained: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization_search, "CALIBRATIONS", ("minmax",))
    monkeypatch.setattr(student_search, "SHAPE_SAMPLES", 30)
    monkeypatch.setattr(profiling, "Worker", InProcess)
    test = write_csv(tmp_path / "test.csv", labelled_rows(40, seed=8))
    inputs = Inputs(model=str(trained), train=data["train"], test=test, command="hasten optimize …")
    options = OptimizeOptions(
        budget=Budget(speedup=1e9, retain=0.9), openvino=True, simple=False, shapes="1x32", valid_rows=40,
        max_lost_points=100.0,
        profile=ProfileOptions(samples=30, breakdown_samples=2, settle_s=0.0),
        distill=DistillOptions(train=TrainOptions(epochs=1, learning_rate=2e-3)),
    )  # fmt: skip
    report = optimize(inputs, tmp_path / "out", options)
    rows = {row.name: row for row in report.variants}
    ours = dict[str, Precision]()
    for name in ("openvino", "student-1x32-openvino"):
        ours |= {f"{name}-fp32": "fp32", f"{name}-int8": "int8"}
        if has_bfloat16():
            ours |= {f"{name}-bf16": "bf16", f"{name}-int8-bf16": "int8+bf16"}
    assert {name: row.precision for name, row in rows.items() if row.format == "openvino"} == ours
    assert len({row.digest for row in report.variants}) == len(rows)
    for name, precision in ours.items():
        judged, facts = {j.criterion for j in rows[name].judgements}, report.steps[name]
        assert judged == {"speedup", "retention"}
        assert precision == "fp32" or f"against_{IN_BFLOAT16.get(precision, 'fp32')}" in facts
        assert rows[name].breakdown_ms["attention"] > 0
