"""What bad input gets from the command line: a clear message that names the value, its status, nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Hasten, Result, labelled_rows, write_csv
from hasten.checkpoint import import_checkpoint
from hasten.errors import ArtifactError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained model without what hasten adds."""
    copy = tmp_path / "model"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("variant.json", "golden.json"))
    return copy


def optimize(hasten: Hasten, model: Path | str, train: str, test: str, *more: object) -> Result:
    arguments = ["optimize", model, "--train", train, "--test", test, "--out", "out", "--samples", 30]
    budget = [] if "--p99-ms" in more or "--speedup" in more else ["--speedup", "0.01"]
    return hasten(*arguments, *budget, *more)


def refused(result: Result, *fragments: str, status: int = 1) -> None:
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    for fragment in fragments:
        assert fragment in result.stderr
    assert result.stdout == ""


def nothing_half_written(out: Path) -> None:
    assert not (out / "report.json").exists()
    assert not [path for path in out.rglob("*") if path.name.endswith((".draft", ".old"))]


BAD_DATA = {
    "missing columns": ("a,b\n1,2\n", ["no column that --text-column could mean", "'a', 'b'"]),
    "empty file": ("", ["train.csv: the file is empty"]),
    "header only": ("text,label\n", ["train.csv: no rows"]),
    "one class": ("text,label\nfine food,good\nlovely food,good\n", ["all 2 rows have the label 'good'"]),
    "unknown labels": ("text,label\nfine,good\nmeh,terrible\n", ["'terrible' (1 rows)", "'good', 'bad', 'mixed'"]),
    "no text": ("text,label\nfine,good\n ,bad\n", ["row 2", "the text is empty"]),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data(kind: str, hasten: Hasten, model: Path, data: dict[str, str], tmp_path: Path) -> None:
    content, fragments = BAD_DATA[kind]
    (tmp_path / "train.csv").write_text(content, encoding="utf-8")
    refused(optimize(hasten, model, "train.csv", data["test"]), *fragments)
    nothing_half_written(tmp_path / "out")


def test_a_missing_data_file(hasten: Hasten, model: Path, data: dict[str, str]) -> None:
    refused(optimize(hasten, model, "nowhere.csv", data["test"]), "nowhere.csv: no such file")


def test_a_very_long_text_is_truncated_and_answered(hasten: Hasten, model: Path, tmp_path: Path) -> None:
    rows = labelled_rows(120, seed=9)
    rows[3] = ("lovely " * 15_000, "good")
    path = write_csv(tmp_path / "long.csv", rows)
    result = optimize(hasten, model, path, write_csv(tmp_path / "test.csv", labelled_rows(60, seed=10)))
    assert result.returncode in (0, 3), result.stderr


def test_a_truncated_safetensors(hasten: Hasten, model: Path, data: dict[str, str], tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(optimize(hasten, model, data["train"], data["test"]), "model: transformers cannot load it")
    nothing_half_written(tmp_path / "out")


def test_a_pickle_checkpoint(hasten: Hasten, model: Path, data: dict[str, str]) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(optimize(hasten, model, data["train"], data["test"]), "only as pickle (pytorch_model.bin)")


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_with_code_of_its_own(hasten: Hasten, model: Path, data: dict[str, str]) -> None:
    edit_config(model, auto_map={"AutoModel": "modeling.Evil"})
    refused(optimize(hasten, model, data["train"], data["test"]), "'auto_map' asks to run code")


def test_an_unproven_architecture_is_named(hasten: Hasten, model: Path, data: dict[str, str]) -> None:
    edit_config(model, model_type="gpt2")
    refused(optimize(hasten, model, data["train"], data["test"]), "architecture 'gpt2'")


def test_another_task_is_named(hasten: Hasten, model: Path, data: dict[str, str]) -> None:
    edit_config(model, problem_type="multi_label_classification")
    refused(optimize(hasten, model, data["train"], data["test"]), "multi_label_classification")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"id2label": {"1": "Bad", "2": "Mixed", "3": "Good"}}, "id2label has the ids 1, 2, 3; they must count from 0"),
        ({"id2label": {"0": "Bad", "1": "Good", "2": "Bad "}}, "id2label has the name 'Bad' twice"),
        ({"id2label": None, "num_labels": 1}, "the task is regression (one label)"),
    ],
)
def test_labels_that_cannot_be_answers(
    changes: dict[str, object], said: str, hasten: Hasten, model: Path, data: dict[str, str]
) -> None:
    edit_config(model, **changes)
    refused(optimize(hasten, model, data["train"], data["test"]), said)


def test_a_folder_whose_name_no_variant_can_have(hasten: Hasten, model: Path, tmp_path: Path) -> None:
    refused(
        hasten("export", model, "--out", tmp_path / ".hidden"), "a variant's name does not begin with a dot", status=2
    )
    assert not (tmp_path / ".hidden").exists()


def test_a_model_too_large_for_one_graph(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.checkpoint.MOST_BYTES", 1000)
    with pytest.raises(ArtifactError, match="the model is too large"):
        import_checkpoint(str(model), tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_an_encoder_that_was_never_fine_tuned(hasten: Hasten, model: Path, data: dict[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("classifier")}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    refused(
        optimize(hasten, model, data["train"], data["test"]), "no weights for classifier.bias", "fine-tune it first"
    )


def test_weights_that_are_not_numbers(hasten: Hasten, model: Path, data: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(optimize(hasten, model, data["train"], data["test"]), "NaN or infinity")
    nothing_half_written(tmp_path / "out")


@pytest.mark.parametrize("source", ["./nowhere", "nobody/no-such-model"])
def test_a_model_that_is_not_there(source: str, hasten: Hasten, data: dict[str, str]) -> None:
    refused(optimize(hasten, source, data["train"], data["test"]), source)


def test_an_unwritable_out(hasten: Hasten, model: Path, data: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    refused(optimize(hasten, model, data["train"], data["test"]), "out: cannot be written", "choose another --out")


def test_a_full_disk(model: Path, data: dict[str, str], tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: writes fail half-way with the same kind of error."""
    small = 64 * 1024

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, small))

    command = [
        sys.executable,
        "-m",
        "hasten",
        "optimize",
        model,
        "--train",
        data["train"],
        "--test",
        data["test"],
        "--speedup",
        "0.01",
        "--out",
        "out",
    ]
    ended = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, cwd=tmp_path, check=False)
    refused(Result(ended.returncode, ended.stdout, ended.stderr), "cannot be written")
    nothing_half_written(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--speedup", "-1"], ["--speedup must be a number above 0, not -1.0"]),
        (["--p99-ms", "0"], ["--p99-ms must be a number above 0"]),
        (["--speedup", "2", "--retain", "1.5"], ["not 1.5"]),
        (["--speedup", "2", "--gate", "maybe"], ["not 'maybe'"]),
        (["--speedup", "2", "--samples", "0"], ["samples, threads and block must be at least 1"]),
        (["--speedup", "2", "--epochs", "0"], ["--epochs must be a number above 0"]),
        (["--speedup", "2", "--learning-rate", "nan"], ["--learning-rate must be a number above 0"]),
        (["--speedup", "2", "--seed", "20261126120000"], ["--seed"]),
    ],
)
def test_options_without_meaning(
    arguments: list[str], fragments: list[str], hasten: Hasten, data: dict[str, str]
) -> None:
    result = hasten("optimize", "m", "--train", data["train"], "--test", data["test"], "--out", "out", *arguments)
    refused(result, *fragments, status=2)


def test_no_budget_is_a_usage_error(hasten: Hasten, data: dict[str, str]) -> None:
    result = hasten("optimize", "m", "--train", data["train"], "--test", data["test"], "--out", "out")
    refused(result, "--p99-ms, --speedup, or both", status=2)


def test_verify_replays_and_refuses_a_tampered_folder(hasten: Hasten, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "variant"
    shutil.copytree(trained, folder)
    fine = hasten("verify", folder)
    assert fine.returncode == 0, fine.stderr
    assert "golden logits replayed" in fine.stdout
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    refused(hasten("verify", folder), "model.safetensors is not the file that was written")


def test_a_checkpoint_of_the_hub_is_named_as_it_was_asked_for(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client is replaced by one that finds a repository with pickles, of which it is asked for none."""
    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, *, local_dir: str, **how: Any) -> str:
        asked.update(how, repository=repository)
        shutil.copyfile(model / "config.json", Path(local_dir) / "config.json")
        return local_dir

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ArtifactError, match=r"^someone/model@v1: no model\.safetensors; .*pickle"):
        import_checkpoint("someone/model@v1", tmp_path / "out")
    assert (asked["repository"], asked["revision"], asked["ignore_patterns"]) == ("someone/model", "v1", "*/*")
    assert not any(name.endswith(".bin") for name in asked["allow_patterns"])
