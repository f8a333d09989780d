"""Several processes train as one does, fail as one does, and end with whoever started them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from conftest import LABELS, labelled_rows, make_checkpoint
from hasten import distillation
from hasten.checkpoint import import_checkpoint
from hasten.distillation import distill
from hasten.errors import UsageError
from hasten.guidance import GuideOptions
from hasten.peers import Peers, peers
from hasten.several_devices import Order, encoded, train_together
from hasten.teaching import DistillOptions, Lesson
from hasten.torch_training import TrainOptions
from hasten.variant import Variant
from hasten.workload import Workload

ROWS = labelled_rows(21, seed=5)
TEXTS, NAMES = zip(*ROWS, strict=True)
DATA = Workload(name="train", source="memory", texts=TEXTS, labels=tuple(LABELS.index(name) for name in NAMES))
TRAIN = TrainOptions(epochs=2, batch=8, learning_rate=1e-3)
GUIDED = DistillOptions(guide=GuideOptions(epochs=1))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # processes of their own are what is tested


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    place = tmp_path_factory.mktemp("teacher")
    return import_checkpoint(str(make_checkpoint(place, seed=1)), place / "torch-fp32")


@pytest.fixture(scope="module")
def bert(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return import_checkpoint(str(checkpoint("bert")), tmp_path_factory.mktemp("bert") / "torch-fp32")


def ordered(bert: Variant, teacher: Variant, place: Path, train: TrainOptions = TRAIN) -> Order:
    options = DistillOptions(train=train, force=True)
    lesson = Lesson(data=DATA, transfer=("the food was lovely", "a dull film"), teacher=teacher, watched=DATA)
    return Order(student=bert, out=place / "out", options=options, name="out", lesson=lesson, work=place / "work")


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.integers(1, 8))
def test_the_mean_over_all_shares_is_the_mean_over_all_rows(losses: list[float], count: int) -> None:
    rows, means, seen = list(range(len(losses))), list[float](), list[int]()
    for rank in range(count):
        own, weight = Peers(rank, count).share(rows)
        means.append(weight * float(np.mean([losses[row] for row in own])))
        seen += own if weight else []
    assert sorted(seen) == rows
    assert float(np.mean(means)) == pytest.approx(float(np.mean(losses)), abs=1e-6)


def test_alone_one_is_all() -> None:
    assert peers() == Peers()
    assert Peers().share([3, 1, 2]) == ([3, 1, 2], 1.0)
    assert Peers().leads


def gradient(checkpoint: Path) -> np.ndarray:
    """That of the only step: AdamW's first moment is a tenth of it."""
    kept = load_file(checkpoint)
    return np.concatenate([kept[name].ravel() for name in sorted(kept) if name.startswith("optimizer.exp_avg.")])


@pytest.mark.parametrize(("guide", "most"), [(GuideOptions(), 1e-4), (GuideOptions(epochs=0.3), 0.2)])
def test_two_processes_go_the_step_that_one_does(
    bert: Variant, teacher: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guide: GuideOptions, most: float
) -> None:
    order = ordered(bert, teacher, tmp_path, replace(TRAIN, batch=len(DATA) - 1, epochs=0.3))
    options, lesson = replace(order.options, guide=guide), replace(order.lesson, guide=teacher, layers=(0, 1))
    steps, stage = list[tuple[int, int]](), "guide" if guide.epochs else "checkpoint"

    def made(name: str, progress: Callable[[int, int], None] | None = None) -> tuple[Variant, np.ndarray]:
        place = tmp_path / f"{name}-work"
        kept = distill(bert, tmp_path / name, options, name="out", lesson=lesson, work=place, progress=progress)
        return kept, gradient(place / f"out.{stage}.safetensors")

    alone, wanted = made("alone")
    monkeypatch.setattr(distillation, "devices", lambda: 2)
    together, found = made("together", lambda done, total: steps.append((done, total)))
    assert set(steps) == {(1, 1)}
    # Relations are compared by means over tokens, and so nearly the same; answers by means over texts.
    assert np.linalg.norm(found - wanted) < most * np.linalg.norm(wanted)
    assert together.manifest.step == replace(alone.manifest.step, facts=together.manifest.step.facts)
    assert not list((tmp_path / "together-work").glob("*order.json"))


def test_what_one_of_them_finds_wrong_is_told_as_what_it_is(bert: Variant, teacher: Variant, tmp_path: Path) -> None:
    order = replace(ordered(bert, teacher, tmp_path), options=GUIDED)
    with pytest.raises(UsageError, match="its torch variant is needed"):
        train_together(order, 2, None)
    assert not order.out.exists()


def lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE  # nobody may be there to ask how it ended
    return False


def test_they_end_with_whoever_started_them(bert: Variant, teacher: Variant, tmp_path: Path) -> None:
    order = ordered(bert, teacher, tmp_path, replace(TRAIN, epochs=1e5))
    code = (
        "import sys; from pathlib import Path; from hasten.several_devices import read_order, train_together\n"
        "train_together(read_order(Path(sys.argv[1])), 2, lambda done, steps: print(done, flush=True))"
    )
    (tmp_path / "order.json").write_bytes(encoded(order))
    command = [sys.executable, "-c", code, str(tmp_path / "order.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        try:
            assert starter.stdout is not None
            assert starter.stdout.readline().strip() == b"1"
            family = psutil.Process(starter.pid).children(recursive=True)
        finally:
            starter.kill()
    assert len(family) >= 3
    until_s = time.monotonic() + 30
    while alive := [process for process in family if lives(process)]:
        assert time.monotonic() < until_s, alive
        time.sleep(0.1)
    assert not order.out.exists()
