"""The whole road on a tiny trained model: the contract of `optimize`, and what it does when run again."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hasten import pipeline, quantization_search, training_plan, variant_maker
from hasten.budget import Budget
from hasten.cli import main
from hasten.errors import DataError, HastenError
from hasten.guidance import GuideOptions
from hasten.measurement import load_measurement
from hasten.pipeline import Inputs, OptimizeOptions, optimize, report_again
from hasten.profiling import ProfileOptions
from hasten.teaching import DistillOptions
from hasten.torch_training import TrainOptions
from hasten.transfer import TransferOptions
from hasten.variant import open_variant

STUDENTS = ("fp32", "int8", "seed1-int8", "undistilled-int8")
FAST = OptimizeOptions(
    budget=Budget(speedup=1e9, retain=0.9),
    shapes="1x32,2x32",
    openvino=False,
    layers="influence",
    seeds=2,
    profile=ProfileOptions(samples=60, breakdown_samples=3),
    distill=DistillOptions(guide=GuideOptions(epochs=1), train=TrainOptions(epochs=3, learning_rate=2e-3)),
    transfer=TransferOptions(augment=0.5),
)


@pytest.fixture(scope="module")
def inputs(trained: Path, data: dict[str, str]) -> Inputs:
    return Inputs(model=str(trained), train=data["train"], test=data["test"], command="hasten optimize …")


@pytest.fixture(scope="module")
def whole_run(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no step can satisfy, so that it goes the whole road."""
    out = tmp_path_factory.mktemp("whole") / "out"
    optimize(inputs, out, FAST)
    return out


def test_a_budget_that_nothing_meets_goes_the_whole_road_and_chooses_nothing(whole_run: Path) -> None:
    report = json.loads((whole_run / "report.json").read_text())
    names = {row["name"] for row in report["variants"]}
    assert {name for name in names if not name.endswith("-rounded-int8")} == {
        "torch-fp32",
        "onnx-fp32",
        "onnx-int8",
        "onnx-int8-dynamic",
        "tfidf",
        "static",
        *(
            f"student-{shape}-{kind}"
            for shape in _shape(report)
            for kind in ("fp32", "int8", "seed1-int8", "undistilled-int8")
        ),
    }
    assert any("over 2 seeds: accuracy" in note for note in report["notes"])
    assert any("texts without labels for the teacher to answer" in note for note in report["notes"])
    assert report["chosen"] is None
    assert report["verdict"] == "missed"
    assert not os.path.lexists(whole_run / "chosen")
    assert {row["verdict"] for row in report["variants"]} == {"missed"}


def test_a_student_that_int8_costs_too_much_is_trained_on_with_its_products_rounded(
    inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization_search, "CALIBRATIONS", ("minmax",))
    monkeypatch.setattr(quantization_search, "SMOOTHINGS", (0.7,))
    monkeypatch.setattr(quantization_search, "SENSITIVITY_TEXTS", 4)
    report = optimize(inputs, out, replace(FAST, max_lost_points=-1000.0, seeds=1, simple=False))
    (name,) = (row.name for row in report.variants if row.name.endswith("-rounded-int8"))
    trained = open_variant(out / "variants" / name.replace("-int8", "-torch"))
    assert trained.manifest.step.options["rounding_bits"] in (7, 8)
    assert trained.manifest.step.facts["answers_from"] == "onnx-fp32 (fp32)"  # whose INT8 costs too much as well
    assert report.steps[name]["search"]["loss"] == "too large"


def test_a_model_that_always_answering_one_label_would_beat_is_refused(
    inputs: Inputs, data: dict[str, str], tmp_path: Path
) -> None:
    swapped = tmp_path / "swapped.csv"
    lines = Path(data["train"]).read_text(encoding="utf-8").splitlines()
    rows = [line.rsplit(",", 1) for line in lines[1:]]
    names = sorted({label for _, label in rows})
    other = dict(zip(names, [*names[1:], names[0]], strict=True))
    swapped.write_text("\n".join([lines[0], *(f"{text},{other[label]}" for text, label in rows)]), encoding="utf-8")
    with pytest.raises(DataError, match=r"always answering .* --force goes on"):
        optimize(replace(inputs, train=str(swapped)), tmp_path / "refused", FAST)
    forced = replace(FAST, budget=Budget(speedup=1e-9), distill=replace(FAST.distill, force=True))
    assert optimize(replace(inputs, train=str(swapped)), tmp_path / "forced", forced).variants


def _shape(report: dict) -> list[str]:
    return [row["name"] for row in report["shapes"] if row["chosen"]]


def test_report_keeps_its_contract(whole_run: Path) -> None:
    report = json.loads((whole_run / "report.json").read_text())
    assert {"schema", "budget", "baseline", "chosen", "host", "variants"} <= set(report)
    for row in report["variants"]:
        assert {
            "name",
            "format",
            "precision",
            "parameters",
            "size_bytes",
            "accuracy",
            "retention",
            "latency_ms",
            "speedup",
            "verdict",
            "reasons",
        } <= set(row)
        assert row["accuracy"]["lower"] <= row["accuracy"]["value"] <= row["accuracy"]["upper"]
        assert row["accuracy"]["n"] == row["latency_ms"]["n"] == 300
        assert {"mean", "p50", "p95", "p99", "p99_lower", "p99_upper", "n"} <= set(row["latency_ms"])
    baseline = report["variants"][0]
    assert (baseline["name"], baseline["speedup"], baseline["retention"]["value"]) == ("torch-fp32", 1.0, 1.0)
    assert baseline["accuracy"]["value"] > 0.9, "the fixture's model must be good for the rest to mean anything"
    assert all(sum(row["breakdown_ms"].values()) > 0 for row in report["variants"])


def test_every_variant_on_disk_is_whole_and_nothing_is_half_written(whole_run: Path) -> None:
    folders = [path for path in (whole_run / "variants").iterdir() if path.is_dir()]
    assert len(folders) >= 8
    for folder in folders:
        assert open_variant(folder).manifest.step.name
    assert not [path for path in whole_run.rglob("*") if path.name.endswith((".draft", ".old"))]


def test_a_finished_run_is_not_computed_again(whole_run: Path, inputs: Inputs) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole_run / "variants").rglob("*") if path.is_file()}
    measured = {path: path.stat().st_mtime_ns for path in (whole_run / "measurements").iterdir()}
    text = (whole_run / "report.json").read_text()
    optimize(inputs, whole_run, FAST)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path: path.stat().st_mtime_ns for path in measured} == measured
    assert (whole_run / "report.json").read_text() == text


def test_a_report_is_made_again_from_the_measurements(whole_run: Path) -> None:
    files = ("report.json", "report.md", "report.html")
    before = {name: (whole_run / name).read_bytes() for name in files}
    for name in files:
        (whole_run / name).unlink()
    report_again(whole_run)
    assert {name: (whole_run / name).read_bytes() for name in files} == before


def test_a_missed_budget_is_exit_status_3_and_json_goes_to_stdout(
    whole_run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hasten", "report", str(whole_run), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 3
    assert json.loads(capfd.readouterr().out) == json.loads((whole_run / "report.json").read_text())


@pytest.fixture
def out(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the whole run, so that what is the same under other options is not computed again."""
    return shutil.copytree(whole_run, tmp_path / "out", symlinks=True)


def test_the_road_ends_at_the_first_step_that_meets_the_budget(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    options = replace(FAST, budget=Budget(speedup=1.01, retain=0.9))
    report = optimize(inputs, out, options)
    assert [row.name for row in report.variants] == ["torch-fp32", "onnx-fp32"]
    assert report.chosen == "onnx-fp32"
    assert (tmp_path / "out" / "chosen").readlink() == Path("variants/onnx-fp32")
    assert report.verdict == "met"


def test_a_baseline_that_meets_the_budget_is_chosen_as_it_is(inputs: Inputs, out: Path) -> None:
    # By the estimate: on a busy machine requests are so alike that their number bounds no p99.
    budget, timing = Budget(p99_ms=60_000.0, gate="point"), ProfileOptions(samples=300, breakdown_samples=0)
    options = replace(FAST, budget=budget, profile=timing, valid_samples=20)
    report = optimize(inputs, out, options)
    assert (report.chosen, report.verdict, len(report.variants)) == ("torch-fp32", "met", 1)
    timed = load_measurement(out / "measurements" / "torch-fp32.valid-baseline.json").latency.samples_ms
    assert len(timed) >= 300  # a p99 is judged on as many before the choice as after it


def test_a_model_that_is_too_small_for_a_student_still_gets_its_report(
    inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variant_maker, "shapes_to_measure", lambda source, shapes: [])
    report = optimize(inputs, out, FAST)
    assert (report.chosen, report.verdict, report.shapes) == (None, "missed", ())
    assert not any(row.name.startswith("student") for row in report.variants)
    assert "No student was made: the model is too small for one, no shape is smaller." in report.notes


def test_texts_of_the_test_data_are_removed_from_training_and_named(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    test = Path(inputs.test).read_text(encoding="utf-8").splitlines()
    leaky = tmp_path / "leaky.csv"
    leaky.write_text(Path(inputs.train).read_text(encoding="utf-8") + "\n".join(test[1:4]) + "\n", encoding="utf-8")
    options = replace(FAST, budget=Budget(speedup=0.01))
    report = optimize(replace(inputs, train=str(leaky)), out, options)
    assert report.removed.count == 3
    assert report.removed.examples[0] == test[1].rsplit(",", 1)[0]
    with pytest.raises(DataError, match="3 texts stand in two splits"):
        optimize(replace(inputs, train=str(leaky)), out, replace(options, strict=True))


def test_a_second_run_in_the_same_folder_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    from filelock import FileLock

    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(HastenError, match="another run is writing here"):
        optimize(inputs, out, FAST)


def test_a_small_checkpoint_can_start_the_student_and_a_fast_sound_int8_teaches_it(
    inputs: Inputs, whole_run: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_p50_ms", lambda measured: 1.0 if measured.variant == "onnx-int8" else 2.0)
    shape = _shape(json.loads((whole_run / "report.json").read_text()))[0]
    start = whole_run / "variants" / f"student-{shape}-start"
    options = replace(FAST, shapes=None, seeds=1, simple=False, max_lost_points=100.0)
    report = optimize(replace(inputs, student=str(start)), out, options)
    taught = open_variant(out / "variants" / f"student-{shape}-torch").manifest.step
    assert taught.facts["answers_from"] == "onnx-int8 (int8)"
    assert f"student-{shape}-int8" in {row.name for row in report.variants}
    assert report.shapes == ()


@pytest.mark.parametrize(
    ("student", "shapes", "says"),
    [(None, "9x512", "9x512"), ("no/such/folder", None, "no/such/folder")],
)
def test_a_student_that_cannot_be_made_is_refused_before_anything_is(
    inputs: Inputs, tmp_path: Path, student: str | None, shapes: str | None, says: str
) -> None:
    with pytest.raises(HastenError, match=says):
        optimize(replace(inputs, student=student), tmp_path, replace(FAST, shapes=shapes))
    assert {path.name for path in (tmp_path / "variants").iterdir()} <= {"torch-fp32", "made.json"}


def test_minutes_are_planned_once_and_kept(inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_plan, "TIMED_S", 0.2)
    options = replace(FAST, distill=DistillOptions(train=TrainOptions(learning_rate=2e-3)), minutes=0.05, simple=False)
    report = optimize(inputs, out, options)
    (note,) = [note for note in report.notes if "plan for 0.05 minutes" in note]
    (name,) = [row.name for row in report.variants if row.name.startswith("student") and row.name.endswith("-fp32")]
    taught = open_variant(out / "variants" / name.replace("-fp32", "-torch")).manifest.step
    assert 0 < taught.options["train"]["epochs"] != TrainOptions().epochs
    digests = {row.name: row.digest for row in report.variants}
    again = optimize(inputs, out, options)
    assert {row.name: row.digest for row in again.variants} == digests
    assert note in again.notes
    assert not {"tfidf", "static"} & set(digests)
