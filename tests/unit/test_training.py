"""The training loop: its order, its schedule, its loss, and that a killed run ends with the same weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from conftest import LABELS, labelled_rows
from hasten import teaching
from hasten.checkpoint import import_checkpoint
from hasten.distillation import distill
from hasten.errors import ArtifactError, DataError, HastenError, UsageError
from hasten.runtime import open_runtime, predict_logits, softmax
from hasten.teaching import DistillOptions, Lesson, answered_texts, distillation_loss, teacher_logits
from hasten.tokenization import TextEncoder
from hasten.torch_runtime import load_torch_model
from hasten.torch_training import TrainingSet, TrainOptions, batches, fit, learning_rate
from hasten.variant import Variant, open_variant
from hasten.workload import Workload

ROWS = labelled_rows(24, seed=5)
TARGETS = [LABELS.index(label) for _, label in ROWS]
DATA = Workload(name="train", source="memory", texts=tuple(text for text, _ in ROWS), labels=tuple(TARGETS))


@pytest.fixture(scope="module")
def bert(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return import_checkpoint(str(checkpoint("bert")), tmp_path_factory.mktemp("bert") / "torch-fp32")


class KilledError(Exception):
    """Stands for the end of the process."""


@given(st.lists(st.integers(1, 60), min_size=1, max_size=150), st.integers(1, 9), st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=60)
def test_every_row_comes_once_an_epoch(lengths: list[int], batch: int, epochs: int, seed: int) -> None:
    options = TrainOptions(epochs=epochs, batch=batch, seed=seed)
    steps = batches(lengths, options)
    assert Counter(row for step in steps for row in step) == dict.fromkeys(range(len(lengths)), epochs)
    assert max(map(len, steps)) <= batch
    assert len(steps) == epochs * math.ceil(len(lengths) / batch)
    per_epoch = len(steps) // epochs
    for epoch in range(epochs):
        rows = [row for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for row in step]
        assert sorted(rows) == list(range(len(lengths)))
    assert steps == batches(lengths, options)


def test_epochs_and_seeds_differ() -> None:
    lengths = list(range(1, 101))
    first, second = np.split(np.asarray(batches(lengths, TrainOptions(epochs=2, batch=10))), 2)
    assert not np.array_equal(first, second)
    assert batches(lengths, TrainOptions(epochs=1, batch=10, seed=1)) != batches(
        lengths, TrainOptions(epochs=1, batch=10, seed=2)
    )


def test_texts_of_similar_length_share_a_step_and_the_steps_come_in_any_order() -> None:
    lengths = np.random.default_rng(0).integers(4, 128, 320).tolist()
    steps = batches(lengths, TrainOptions(epochs=1, batch=20))
    spread = np.mean([np.ptp([lengths[row] for row in step]) for step in steps])
    assert spread < np.ptp(lengths) / 8
    longest = [max(lengths[row] for row in step) for step in steps]
    assert longest != sorted(longest)


@pytest.mark.parametrize("given", [{"epochs": 0}, {"epochs": math.inf}, {"learning_rate": math.nan}, {"batch": 0}])
def test_training_without_meaning_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TrainOptions(**given)


def test_the_learning_rate_rises_then_falls() -> None:
    options = TrainOptions(learning_rate=1.0, warmup_share=0.25)
    found = [learning_rate(step, 8, options) for step in range(8)]
    assert found == pytest.approx([1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


@given(st.integers(1, 500), st.floats(0, 1), st.floats(1e-6, 1))
@settings(max_examples=60)
def test_the_learning_rate_is_that_of_transformers_a_step_on(total: int, share: float, peak: float) -> None:
    options = TrainOptions(learning_rate=peak, warmup_share=share)
    found = [learning_rate(step, total, options) for step in range(total)]
    assert all(0 < rate <= peak for rate in found)
    warmup = max(1, math.ceil(total * share))
    rising, falling = found[:warmup], found[warmup - 1 :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if warmup <= total:
        assert max(found) == pytest.approx(peak)


def test_the_loss_by_hand() -> None:
    import torch

    student, teacher = np.asarray([[1.0, -1.0, 0.5], [0.0, 2.0, 0.0]]), np.asarray([[2.0, 0.0, 0.0], [-1.0, 1.0, 3.0]])
    labels, options = [0, 2], DistillOptions(temperature=3.0, soft_weight=0.7)
    towards = special.softmax(teacher / 3, axis=-1)
    soft = (towards * (special.log_softmax(teacher / 3, -1) - special.log_softmax(student / 3, -1))).sum(-1).mean()
    hard = -special.log_softmax(student, -1)[[0, 1], labels].mean()
    found = distillation_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(labels), options)
    assert float(found) == pytest.approx(0.7 * 9 * soft + 0.3 * hard, abs=1e-9)


def test_the_ends_of_the_soft_weight() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 0])
    hard = distillation_loss(student, teacher, labels, DistillOptions(soft_weight=0.0))
    torch.testing.assert_close(hard, torch.nn.functional.cross_entropy(student, labels))
    assert float(distillation_loss(teacher, teacher, labels, DistillOptions(soft_weight=1.0))) == pytest.approx(0)
    assert float(distillation_loss(student, teacher, labels, DistillOptions(soft_weight=1.0))) > 0


def test_the_soft_gradient_keeps_its_size_at_high_temperatures() -> None:
    """T² in the loss: for T → ∞ the gradient is that of half the squared distance of centred logits, over labels."""
    import torch

    student = torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, -0.5]], dtype=torch.float64)
    options = DistillOptions(temperature=1e4, soft_weight=1.0)
    distillation_loss(student, teacher, torch.tensor([0]), options).backward()
    apart = (student.detach() - student.detach().mean()) - (teacher - teacher.mean())
    torch.testing.assert_close(student.grad, apart / 3, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"soft_weight": -0.1},
        {"soft_weight": 1.1},
        {"soft_weight": math.nan},
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        DistillOptions(**options)


def run(
    variant: Variant, checkpoint: Path, options: TrainOptions, *, kill_at: int | None = None, key: str = "key",
    loss: Callable[[Any, Sequence[int]], Any] | None = None,
) -> tuple[Any, list[int]]:  # fmt: skip
    """Trains on the labels; the model and the steps that were done in this process."""
    import torch

    model, done = load_torch_model(variant), list[int]()

    def progress(step: int, total: int) -> None:
        done.append(step)
        if step == kill_at:
            raise KilledError

    def cross_entropy(logits: Any, rows: Sequence[int]) -> Any:
        return torch.nn.functional.cross_entropy(logits, torch.tensor(TARGETS)[list(rows)])

    def of_step(inputs: dict[str, Any], rows: Sequence[int]) -> Any:
        return (loss or cross_entropy)(model(**inputs).logits, rows)

    data = TrainingSet.of(variant, model, DATA.texts)
    fit(model, data, of_step, options, checkpoint=checkpoint, key=key, progress=progress)
    return model, done


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}


def same(one: Any, other: Any) -> bool:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kill_at", [1, 3, 6])
def test_a_killed_run_ends_with_the_same_weights(bert: Variant, tmp_path: Path, kill_at: int, dropout: bool) -> None:
    options = TrainOptions(epochs=2, batch=8, learning_rate=1e-3, checkpoint_s=0.0, dropout=dropout)
    whole, done = run(bert, tmp_path / "whole.safetensors", options)
    assert done == [1, 2, 3, 4, 5, 6]
    with pytest.raises(KilledError):
        run(bert, tmp_path / "killed.safetensors", options, kill_at=kill_at)
    resumed, rest = run(bert, tmp_path / "killed.safetensors", options)
    assert rest == list(range(kill_at + 1, 7))
    assert same(whole, resumed)
    assert not whole.training
    assert not same(whole, load_torch_model(bert))


def test_a_checkpoint_of_other_inputs_is_not_continued(bert: Variant, tmp_path: Path) -> None:
    options = TrainOptions(epochs=1, batch=8, checkpoint_s=0.0)
    path = tmp_path / "state.safetensors"
    run(bert, path, options, key="one")
    _, done = run(bert, path, options, key="two")
    assert done == [1, 2, 3]


@pytest.mark.parametrize("keep", [0, 20, 1000])
def test_a_damaged_checkpoint_is_refused_by_name(bert: Variant, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "state.safetensors"
    options = TrainOptions(epochs=1, batch=8, checkpoint_s=0.0)
    run(bert, path, options)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"state\.safetensors: damaged checkpoint.*delete it"):
        run(bert, path, options)


def test_the_only_checkpoint_before_its_time_is_that_of_the_end(bert: Variant, tmp_path: Path) -> None:
    options, path = TrainOptions(epochs=1, batch=8, checkpoint_s=3600), tmp_path / "state.safetensors"
    with pytest.raises(KilledError):
        run(bert, path, options, kill_at=2)
    assert list(tmp_path.iterdir()) == []
    whole, _ = run(bert, path, options)
    again, done = run(bert, path, options)
    assert done == []
    assert same(whole, again)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_its_rows(bert: Variant, tmp_path: Path, value: float) -> None:
    options = TrainOptions(epochs=1, batch=8)
    lengths = [len(e) for e in TextEncoder(bert)(DATA.texts)]
    second = batches(lengths, options)[1]

    def loss(logits: Any, rows: Sequence[int]) -> Any:
        return logits.sum() * (value if list(rows) == second else 0.0)

    with pytest.raises(HastenError) as caught:
        run(bert, tmp_path / "state.safetensors", options, loss=loss)
    assert f"the loss became {value} at step 1 (training rows {second[:8]} …)" in str(caught.value)
    assert "lower the learning rate" in str(caught.value)


def test_frozen_layers_stay_as_they_are(bert: Variant, tmp_path: Path) -> None:
    options = TrainOptions(epochs=1, batch=8, learning_rate=1e-2, frozen_layers=1)
    before = weights(load_torch_model(bert))
    after = weights(run(bert, tmp_path / "state.safetensors", options)[0])
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert not [name for name in changed if "embeddings" in name or ".layer.0." in name]
    assert {name for name in before if ".layer.1." in name} <= changed | {n for n in before if n.endswith("key.bias")}
    assert "classifier.weight" in changed


def test_dropout_only_where_it_is_asked_for(bert: Variant, tmp_path: Path) -> None:
    made = [
        run(bert, tmp_path / f"{dropout}.safetensors", TrainOptions(epochs=1, batch=8, dropout=dropout))[0]
        for dropout in (False, True)
    ]
    assert not same(*made)
    assert not any(model.training for model in made)


def test_distillation_goes_towards_the_teacher_and_is_the_same_again(bert: Variant, tmp_path: Path) -> None:
    from hasten.students import Shape, init_student

    shape = Shape(layers=1, hidden=32, heads=4, intermediate=64)
    start = init_student(bert, shape, tmp_path / "start", name="start")
    options = DistillOptions(soft_weight=1.0, train=TrainOptions(epochs=12, batch=8, learning_rate=3e-3))

    lesson = Lesson(data=DATA, teacher=bert)

    def made(name: str) -> Variant:
        return distill(start, tmp_path / name, options, name=name, lesson=lesson, work=tmp_path / "work")

    one, two = made("one"), made("two")
    assert one.digest == two.digest == open_variant(one.path).digest
    assert (one.manifest.step.name, one.manifest.step.parent) == ("distill", start.digest)
    assert one.manifest.step.options["teacher"] == bert.digest
    teacher, before, after = (softmax(predict_logits(open_runtime(v), DATA.texts)) for v in (bert, start, one))
    assert np.abs(after - teacher).mean() < 0.5 * np.abs(before - teacher).mean()
    lesson = Lesson(data=DATA, teacher=None)
    alone = distill(start, tmp_path / "alone", options, name="alone", lesson=lesson, work=tmp_path / "work")
    assert alone.manifest.step.name == "train"
    assert alone.manifest.step.options["soft_weight"] == 0


def test_distillation_refuses_what_does_not_fit(bert: Variant, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "name": "out", "lesson": Lesson(data=DATA, teacher=bert), "work": tmp_path / "work",
    }  # fmt: skip
    onnx = replace(bert, manifest=replace(bert.manifest, format="onnx"))
    with pytest.raises(ArtifactError, match="only a torch variant can be trained"):
        distill(onnx, tmp_path / "out", **arguments)
    renamed = replace(bert, manifest=replace(bert.manifest, labels=["a", "b", "c"]))
    with pytest.raises(ArtifactError, match="different labels"):
        distill(renamed, tmp_path / "out", **arguments)
    with pytest.raises(DataError, match="no texts"):
        distill(bert, tmp_path / "out", **(arguments | {"lesson": Lesson(data=DATA.take([]), teacher=bert)}))
    assert not (tmp_path / "out").exists()


def test_what_a_teacher_has_answered_counts_by_whole_parts(
    bert: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "CACHED_TEXTS", 4)
    teacher_logits(bert, DATA.texts[:10], tmp_path, threads=1)
    assert answered_texts(bert, DATA.texts[:10], tmp_path) == 8
    assert answered_texts(bert, [*DATA.texts[:10], "a new one"], tmp_path) == 8
    assert answered_texts(bert, DATA.texts[1:10], tmp_path) == 0


def test_teacher_logits_are_kept_and_a_damaged_cache_is_refused(bert: Variant, tmp_path: Path) -> None:
    texts = DATA.texts[:6]
    found = teacher_logits(bert, texts, tmp_path, threads=1)
    np.testing.assert_allclose(found, predict_logits(open_runtime(bert), texts), atol=1e-5)
    (path,) = tmp_path.iterdir()
    unreadable = Variant(path=tmp_path / "none", manifest=bert.manifest)
    np.testing.assert_array_equal(teacher_logits(unreadable, texts, tmp_path, threads=1), found)
    assert teacher_logits(bert, texts[:3], tmp_path, threads=1).shape == (3, 3)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ArtifactError, match=f"{path.name}: damaged cache of logits"):
        teacher_logits(bert, texts, tmp_path, threads=1)
