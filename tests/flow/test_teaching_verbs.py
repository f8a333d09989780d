"""`hasten students` and `hasten distill` as a user types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import Hasten
from hasten import student_search, training_plan
from hasten.variant import open_variant


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(student_search, "SHAPE_SAMPLES", 30)
    monkeypatch.setattr(student_search, "GLANCE_SAMPLES", 10)


def test_students_shows_the_table_with_the_budgets_line_and_the_reason(
    hasten: Hasten, trained: Path, data: dict[str, str], tmp_path: Path
) -> None:
    arguments = ["students", trained, "--data", data["train"], "--shapes", "1x16,2x32,2x32f16", "--threads", 1]
    status, shown, _ = hasten(*arguments, "--p99-ms", 60_000)
    assert status == 0
    rows = [line.split()[0] for line in shown.splitlines() if line.endswith(("fits", "fits, chosen", "no headroom"))]
    assert rows == ["1x16", "2x32f16", "2x32"]
    assert "fits, chosen" in shown
    assert "2x32 is the largest that keeps the latency budget with headroom: no larger one was measured." in shown
    status, shown, _ = hasten(*arguments, "--speedup", 1e6, "--json")
    found = json.loads(shown)
    # 2x32 has all of 1x16, so it is not even built; a narrower feed-forward block may make up for more layers.
    assert [(row["name"], row["fits"], row["chosen"]) for row in found] == [
        ("1x16", False, True), ("2x32f16", False, False)
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_students_needs_a_budget(hasten: Hasten, trained: Path, data: dict[str, str]) -> None:
    status, _, said = hasten("students", trained, "--data", data["train"])
    assert status == 2
    assert "a budget needs a latency" in said


def test_distill_takes_further_texts_and_keeps_away_from_what_is_held_out(
    hasten: Hasten, trained: Path, data: dict[str, str], tmp_path: Path
) -> None:
    held = Path(data["test"]).read_text(encoding="utf-8").splitlines()[1].rsplit(",", 1)[0]
    (tmp_path / "more.csv").write_text(f"text\n{held}\na great day at the lovely room\n", encoding="utf-8")
    status, shown, said = hasten(
        "distill", trained, "--train", data["train"], "--shape", "1x16", "--epochs", 1, "--guide-epochs", 0.5,
        "--unlabelled", "more.csv", "--augment", 0.5, "--held-out", data["test"], "--out", "student",
        "--objective", "mse",
    )  # fmt: skip
    assert status == 0, said
    made = open_variant(shown.strip())
    rows = len(Path(data["train"]).read_text(encoding="utf-8").splitlines()) - 1
    assert made.manifest.step.facts["transfer_texts"] == 1 + round(0.5 * rows)
    assert made.manifest.step.options["objective"] == "mse"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more.csv", "student"]


def test_distill_plans_its_minutes_and_starts_from_the_layers_of_most_influence(
    hasten: Hasten, trained: Path, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_plan, "TIMED_S", 0.05)
    monkeypatch.setattr(training_plan, "MOST_EPOCHS", 1.0)
    monkeypatch.setattr(training_plan, "MOST_NEW_TEXTS", 0.25)
    status, shown, said = hasten(
        "distill", trained, "--train", data["train"], "--shape", "1x32", "--minutes", 5, "--layers", "influence",
        "--out", "student",
    )  # fmt: skip
    assert status == 0, said
    made = open_variant(shown.strip()).manifest.step
    rows = len(Path(data["train"]).read_text(encoding="utf-8").splitlines()) - 1
    assert made.options["train"]["epochs"] == 1
    assert made.facts["transfer_texts"] == round(0.25 * rows)


@pytest.mark.parametrize(
    ("minutes", "says"),
    [(["--minutes", 0], "--minutes must be above 0, not 0"),
     (["--minutes", 5, "--guide-epochs", 1], "leave out --guide-epochs")],
)  # fmt: skip
def test_minutes_that_cannot_be_planned_are_refused_before_anything_is_done(
    hasten: Hasten, trained: Path, data: dict[str, str], tmp_path: Path, minutes: list[object], says: str
) -> None:
    arguments = ["optimize", trained, "--train", data["train"], "--test", data["test"], "--speedup", 2, "--out", "out"]
    status, _, said = hasten(*arguments, *minutes)
    assert status == 2
    assert says in said
    assert list(tmp_path.iterdir()) == []


def test_what_others_put_where_the_output_shall_be_stays(
    hasten: Hasten, trained: Path, data: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    verbs = (
        ("distill", trained, "--train", data["train"], "--shape", "1x16"), ("import", trained), ("export", trained),
    )  # fmt: skip
    for verb in verbs:
        status, _, said = hasten(*verb, "--out", "mine")
        assert (status, "mine: holds other things than a variant" in said) == (2, True)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.tex"]


def test_variants_that_cannot_be_told_apart_are_not_measured(
    hasten: Hasten, trained: Path, data: dict[str, str], tmp_path: Path
) -> None:
    status, _, said = hasten("profile", trained, trained, "--data", data["test"], "--out", "out")
    assert (status, "two variants are named" in said) == (2, True)
    other = tmp_path / "other"
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("variant.json", "golden.json"))
    config = json.loads((other / "config.json").read_text())
    names = list(config["id2label"].values())[::-1]
    config |= {"id2label": {str(i): name for i, name in enumerate(names)}}
    config |= {"label2id": {name: i for i, name in enumerate(names)}}
    (other / "config.json").write_text(json.dumps(config))
    status, _, said = hasten("profile", trained, other, "--data", data["test"], "--out", "out")
    assert (status, "the same texts cannot judge both" in said) == (2, True)
    assert not (tmp_path / "out").exists()
