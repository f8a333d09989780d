"""What a student learns from inside its teacher: the losses by hand, every architecture, resumed after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special

from conftest import LABELS, labelled_rows
from hasten.checkpoint import import_checkpoint
from hasten.distillation import distill
from hasten.errors import ArtifactError, UsageError
from hasten.guidance import Guide, GuideOptions, hidden_loss, relation_heads, relation_loss
from hasten.students import Shape, init_student, stand_for
from hasten.teaching import DistillOptions, Lesson
from hasten.torch_runtime import load_torch_model
from hasten.torch_training import TrainingSet, TrainOptions, fit
from hasten.variant import Variant
from hasten.workload import Workload

ROWS = labelled_rows(24, seed=8)
TEXTS = [text for text, _ in ROWS]
DATA = Workload(name="train", source="memory", texts=tuple(TEXTS), labels=tuple(LABELS.index(x) for _, x in ROWS))
ARCHITECTURES = ("bert", "distilbert", "roberta", "mpnet", "electra", "deberta-v2", "modernbert", "albert")
NARROW = Shape(layers=1, hidden=16, heads=2, intermediate=32)


@pytest.fixture(scope="module")
def teacher(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Variant]:
    def make(architecture: str = "bert") -> Variant:
        return import_checkpoint(str(checkpoint(architecture)), tmp_path_factory.mktemp(architecture) / "torch-fp32")

    return make


def side_by_side(teacher: Variant, student: Variant, options: GuideOptions) -> tuple[Guide, TrainingSet]:
    ours, theirs = load_torch_model(student), load_torch_model(teacher)
    texts = TrainingSet.of(teacher, theirs, TEXTS)
    return Guide(theirs, ours, texts, options, stand_for(teacher, student)), TrainingSet.of(student, ours, TEXTS)


def test_relations_by_hand() -> None:
    import torch

    generator = np.random.default_rng(0)
    theirs, ours = generator.standard_normal((2, 5, 8)), generator.standard_normal((2, 5, 4))
    mask = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = relation_loss(torch.tensor(theirs), torch.tensor(ours), torch.tensor(mask), 2)
    parts = []
    for row in range(2):
        kept = int(mask[row].sum())
        for head in range(2):
            p, q = (
                special.softmax(x @ x.T / np.sqrt(x.shape[1]), axis=-1)
                for x in (theirs[row, :kept, 4 * head : 4 * head + 4], ours[row, :kept, 2 * head : 2 * head + 2])
            )
            parts += special.rel_entr(p, q).sum(-1).tolist()
    assert float(found) == pytest.approx(np.mean(parts), abs=1e-6)
    assert float(relation_loss(torch.tensor(ours), torch.tensor(ours), torch.tensor(mask), 2)) == pytest.approx(0)


def test_hidden_states_by_hand() -> None:
    import torch

    generator = np.random.default_rng(1)
    theirs, ours = generator.standard_normal((2, 2, 3, 4)), generator.standard_normal((2, 2, 3, 4))
    mask = np.asarray([[1, 1, 1], [1, 0, 0]])
    found = hidden_loss([torch.tensor(x) for x in ours], [torch.tensor(x) for x in theirs], torch.tensor(mask))
    squares = (theirs - ours)[:, mask.astype(bool)] ** 2
    assert float(found) == pytest.approx(np.mean([layer.mean() for layer in squares]))


@pytest.mark.parametrize(
    ("widths", "heads"),
    [((384, 768), 24), ((384, 384), 24), ((128, 768), 8), ((32, 16), 1), ((100, 64), 4), ((768, 312), 12)],
)
def test_relation_heads_divide_both_widths(widths: tuple[int, int], heads: int) -> None:
    assert relation_heads(*widths) == heads
    assert all(width % heads == 0 for width in widths)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(
    teacher: Callable[[str], Variant], architecture: str, tmp_path: Path
) -> None:
    source = teacher(architecture)
    guide, texts = side_by_side(source, source, GuideOptions(epochs=1))
    rows = [0, 1, 2, 3]
    assert float(guide.loss(texts.inputs(rows), rows).detach()) == pytest.approx(0, abs=1e-6)
    if architecture != "albert":  # its layers share their weights, so there is no narrower one to cut
        student = init_student(source, NARROW, tmp_path / "start", name="start")
        guide, texts = side_by_side(source, student, GuideOptions(epochs=1, hidden_weight=1.0))
        assert float(guide.loss(texts.inputs(rows), rows).detach()) > 0.01


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_the_loss_falls(teacher: Callable[[str], Variant], weights: tuple[float, float], tmp_path: Path) -> None:
    source = teacher("bert")
    student = init_student(source, NARROW, tmp_path / "start", name="start", start="random")
    options = GuideOptions(epochs=1, hidden_weight=weights[0], relation_weight=weights[1])
    guide, texts = side_by_side(source, student, options)
    rows = list(range(len(TEXTS)))

    def now() -> float:
        return float(guide.loss(texts.inputs(rows), rows).detach())

    before = now()
    train = TrainOptions(epochs=30, batch=8, learning_rate=1e-2)
    fit(guide.trainee, texts, guide.loss, train, checkpoint=tmp_path / "state.safetensors", key="key")
    assert now() < 0.8 * before
    guide.end()
    guide.trainee["student"](**texts.inputs(rows))
    assert not guide._seen["student"]


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("kill_at", [2, 5, 8])
def test_killed_in_either_stage_it_ends_with_the_same_student(
    teacher: Callable[[str], Variant], tmp_path: Path, kill_at: int
) -> None:
    source = teacher("bert")
    start = init_student(source, NARROW, tmp_path / "start", name="start")
    options = DistillOptions(
        guide=GuideOptions(epochs=1.5, hidden_weight=0.5), train=TrainOptions(epochs=2, batch=8, checkpoint_s=0.0)
    )
    lesson = Lesson(
        data=DATA, transfer=("a great day", "a dull film then"), teacher=source, guide=source, layers=(1,), watched=DATA
    )
    calls = 0

    def killing(_done: int, _total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise KilledError

    def made(name: str, work: Path, progress: Any = None) -> Variant:
        return distill(start, tmp_path / work / name, options, name="student", lesson=lesson, work=tmp_path / work,
                       progress=progress)  # fmt: skip

    whole = made("out", Path("whole"))
    with pytest.raises(KilledError):
        made("out", Path("killed"), killing)
    assert made("out", Path("killed")).digest == whole.digest
    facts = whole.manifest.step.facts
    assert facts["transfer_texts"] == 2
    assert facts["answers_from"] == f"{source.name} (fp32)"
    assert list(facts["watched_accuracy"])[-1] == "8"


def test_a_teacher_with_other_tokens_shows_its_answers_alone(teacher: Callable[[str], Variant], tmp_path: Path) -> None:
    source = teacher("bert")
    start = init_student(source, NARROW, tmp_path / "start", name="start")
    path = start.path / "tokenizer.json"
    path.write_text(path.read_text().replace('"great"', '"grxat"').replace('"lovely"', '"lxvely"'))
    options = DistillOptions(guide=GuideOptions(epochs=1), train=TrainOptions(epochs=1, batch=8))
    lesson = Lesson(data=DATA, teacher=source, guide=source, layers=(1,))
    with pytest.raises(ArtifactError, match=r"into different tokens.*use answers alone"):
        distill(start, tmp_path / "out", options, name="out", lesson=lesson, work=tmp_path / "work")
    without = DistillOptions(train=TrainOptions(epochs=1, batch=8))
    assert distill(start, tmp_path / "out", without, name="out", lesson=lesson, work=tmp_path / "work").name == "out"


@pytest.mark.parametrize(
    "options",
    [{"epochs": -1}, {"hidden_weight": -1}, {"learning_rate": 0}, {"epochs": 1, "relation_weight": 0}],
)
def test_options_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        GuideOptions(**options)


def test_hidden_states_of_a_student_need_a_layer_of_the_teacher_each(
    teacher: Callable[[str], Variant], tmp_path: Path
) -> None:
    source = teacher("bert")
    start = init_student(source, NARROW, tmp_path / "start", name="start")
    options = DistillOptions(guide=GuideOptions(epochs=1, hidden_weight=1.0), train=TrainOptions(epochs=1, batch=8))
    lesson = Lesson(data=DATA, teacher=source, guide=source)
    with pytest.raises(UsageError, match="1 layers of the student, 0 of the teacher"):
        distill(start, tmp_path / "out", options, name="out", lesson=lesson, work=tmp_path / "work")
    assert not (tmp_path / "out").exists()
