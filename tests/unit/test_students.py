"""Students: their shapes, which layers they take, and first weights that answer for every architecture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import labelled_rows, tiny_config
from hasten.budget import Budget
from hasten.checkpoint import import_checkpoint
from hasten.errors import ArtifactError, UsageError
from hasten.golden import replay_golden
from hasten.measurement import Latency
from hasten.runtime import open_runtime, predict_logits
from hasten.student_search import clearly_slow
from hasten.students import (
    Shape,
    candidate_shapes,
    init_student,
    largest_fitting,
    parse_shapes,
    shape_of,
    spaced_layers,
    student_shape,
)  # fmt: skip
from hasten.torch_runtime import load_torch_model
from hasten.torch_training import TrainingSet
from hasten.variant import Variant, open_variant

MINILM = Shape(layers=6, hidden=384, heads=12, intermediate=1536)
TINY = Shape(layers=2, hidden=32, heads=4, intermediate=64)
TEXTS = [text for text, _ in labelled_rows(12, seed=11)]
ARCHITECTURES = ("bert", "distilbert", "roberta", "mpnet", "electra", "deberta-v2", "modernbert", "albert")


@pytest.fixture(scope="module")
def teacher(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Variant]:
    made: dict[str, Variant] = {}

    def make(architecture: str = "bert") -> Variant:
        if architecture not in made:
            out = tmp_path_factory.mktemp(architecture) / "torch-fp32"
            made[architecture] = import_checkpoint(str(checkpoint(architecture)), out)
        return made[architecture]

    return make


def logits(variant: Variant) -> np.ndarray:
    return predict_logits(open_runtime(variant), TEXTS, batch=len(TEXTS))


def test_a_shape_keeps_the_teachers_head_size_and_ratio() -> None:
    found = student_shape(MINILM, 3, 192)
    assert found == Shape(layers=3, hidden=192, heads=6, intermediate=768)
    assert str(found) == "3x192"
    assert found.encoder_weights == 3 * (4 * 192**2 + 2 * 192 * 768)


@pytest.mark.parametrize(
    ("layers", "hidden", "says"),
    [(7, 384, "does not fit"), (0, 384, "does not fit"), (3, 416, "does not fit"), (3, 0, "does not fit"),
     (3, 100, "multiple of the teacher's head size 32, not 100")],
)  # fmt: skip
def test_a_shape_that_does_not_fit_is_refused(layers: int, hidden: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        student_shape(MINILM, layers, hidden)


def test_shapes_are_parsed_from_the_smallest() -> None:
    assert [str(shape) for shape in parse_shapes("3x384, 2x128 ,6x192", MINILM)] == ["2x128", "6x192", "3x384"]


@pytest.mark.parametrize("text", ["", "3", "3x", "x384", "3x384,", "3*384", "-3x384", "3x384x2", "3x384;2x128"])
def test_shapes_that_cannot_be_read_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="written as LAYERSxHIDDEN") as caught:
        parse_shapes(text, MINILM)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "layers"),
    [
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (6, 3, [1, 3, 5]),
        (6, 2, [2, 5]),
        (6, 1, [5]),
        (12, 4, [2, 5, 8, 11]),
        (5, 2, [1, 4]),
    ],
)
def test_layers_by_example(old: int, new: int, layers: list[int]) -> None:
    assert spaced_layers(old, new) == layers


@given(st.integers(1, 48), st.data())
@settings(max_examples=60)
def test_layers_are_evenly_spaced_with_the_last_one(old: int, data: st.DataObject) -> None:
    new = data.draw(st.integers(1, old))
    found = spaced_layers(old, new)
    assert len(found) == new == len(set(found))
    assert found == sorted(found)
    assert found[-1] == old - 1
    assert found[0] >= 0
    gaps = np.diff([-1, *found])
    assert gaps.max() - gaps.min() <= 1 or np.abs(gaps - old / new).max() <= 1


@given(st.integers(1, 24), st.sampled_from([32, 64]), st.integers(1, 16), st.sampled_from([2, 3, 4]))
@settings(max_examples=60)
def test_candidates_are_smaller_than_any_teacher(layers: int, size: int, heads: int, ratio: int) -> None:
    whole = Shape(layers=layers, hidden=heads * size, heads=heads, intermediate=heads * size * ratio)
    found = candidate_shapes(whole)
    costs = [shape.encoder_weights for shape in found]
    assert costs == sorted(costs)
    assert all(cost < whole.encoder_weights for cost in costs)
    assert all(shape.hidden // shape.heads == size and shape.hidden % shape.heads == 0 for shape in found)
    assert all(shape.layers <= layers and shape.hidden <= whole.hidden for shape in found)


def test_candidates_for_common_teachers() -> None:
    assert [str(shape) for shape in candidate_shapes(MINILM)][::3] == ["1x128", "3x192", "2x384"]
    assert candidate_shapes(TINY), "an unusual teacher gets halves and quarters"
    small = Shape(layers=3, hidden=312, heads=12, intermediate=600)
    assert [str(shape) for shape in candidate_shapes(small)] == ["1x78", "1x156"], "as one with an unusual head size"
    assert not candidate_shapes(Shape(layers=1, hidden=64, heads=1, intermediate=128))


def test_one_stall_rules_no_shape_out() -> None:
    def latency(ms: float, stall: float) -> Latency:
        return Latency(samples_ms=(*[ms] * 59, stall), tokens=(9,) * 60, tokenizer_ms=(0.1,) * 60)

    base, budget = latency(20, 20), Budget(p99_ms=5, speedup=4)
    assert not clearly_slow(budget, latency(1, 40), base)
    assert not clearly_slow(budget, latency(5.5, 5.5), base)  # a quarter over is not clear yet
    assert clearly_slow(budget, latency(7, 7), base)
    assert clearly_slow(Budget(speedup=8), latency(3.5, 3.5), base)


def test_the_largest_that_fits_is_chosen() -> None:
    small, middle, large = (student_shape(MINILM, *pair) for pair in ((2, 128), (3, 384), (6, 192)))
    assert largest_fitting([(small, True), (middle, True), (large, True)]) == middle
    assert largest_fitting([(small, True), (middle, False), (large, True)]) == large
    assert largest_fitting([(small, False)]) is None
    assert largest_fitting([]) is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_shape_of_a_variant_is_read_from_its_folder(architecture: str, teacher: Callable[[str], Variant]) -> None:
    assert shape_of(teacher(architecture)) == TINY


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_student_of_the_same_shape_answers_as_its_teacher(
    architecture: str, teacher: Callable[[str], Variant], tmp_path: Path
) -> None:
    source = teacher(architecture)
    student = init_student(source, TINY, tmp_path / "student", name="student-2x32-fp32")
    np.testing.assert_array_equal(logits(student), logits(source))
    assert student.manifest.parameters == source.manifest.parameters
    assert (student.name, student.manifest.step.name) == ("student-2x32-fp32", "init")
    assert student.manifest.step.parent == source.digest


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("layers", "hidden"), [(1, 32), (2, 16), (1, 8)])
def test_a_smaller_student_loads_and_answers(
    architecture: str, layers: int, hidden: int, teacher: Callable[[str], Variant], tmp_path: Path
) -> None:
    source = teacher(architecture)
    shape = student_shape(TINY, layers, hidden)
    made = open_variant(init_student(source, shape, tmp_path / "student", name="student").path)
    answers = logits(made)
    assert answers.shape == (len(TEXTS), 3)
    assert np.isfinite(answers).all()
    assert np.ptp(answers, axis=0).max() > 1e-4, "every text gets the same answer"
    assert shape_of(made) == shape
    shared = architecture == "albert" and hidden == TINY.hidden  # all of its layers have the same weights
    assert (made.manifest.parameters.encoder < source.manifest.parameters.encoder) is not shared
    assert replay_golden(made) <= 1e-5
    assert (made.labels, made.manifest.max_tokens) == (source.labels, source.manifest.max_tokens)


def test_a_shallow_student_holds_the_teachers_own_layers(teacher: Callable[[str], Variant], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    source = teacher("bert")
    student = init_student(source, student_shape(TINY, 1, 32), tmp_path / "student", name="student")
    ours, theirs = load_file(student.path / student.weights), load_file(source.path / source.weights)
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight, theirs[name.replace(".layer.0.", ".layer.1.")], err_msg=name)


def test_a_narrow_student_keeps_whole_heads_and_neurons_of_its_teacher(
    teacher: Callable[[str], Variant], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    source = teacher("bert")
    student = init_student(source, student_shape(TINY, 2, 16), tmp_path / "student", name="student")
    ours, theirs = load_file(student.path / student.weights), load_file(source.path / source.weights)
    for layer in range(2):
        for part, size in (("attention.self.query", 8), ("intermediate.dense", 1)):
            name = f"bert.encoder.layer.{layer}.{part}.bias"
            groups = {tuple(row) for row in theirs[name].reshape(-1, size)}
            assert {tuple(row) for row in ours[name].reshape(-1, size)} <= groups, name


def test_a_narrow_student_keeps_the_heads_and_neurons_that_weigh_most(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    raw, head, neurons = Path(shutil.copytree(checkpoint("bert"), tmp_path / "raw")), slice(16, 24), slice(40, 56)
    weights = load_file(raw / "model.safetensors")
    for layer in ("bert.encoder.layer.0.", "bert.encoder.layer.1."):
        weights[f"{layer}attention.self.value.weight"][head] *= 9
        weights[f"{layer}attention.output.dense.weight"][:, head] *= 9
        weights[f"{layer}intermediate.dense.weight"][neurons] *= 9
    save_file(weights, raw / "model.safetensors", metadata={"format": "pt"})
    source = import_checkpoint(str(raw), tmp_path / "torch-fp32")
    student = init_student(source, student_shape(TINY, 2, 8), tmp_path / "student", name="student")
    ours = load_file(student.path / student.weights)
    for part, kept in (("attention.self.query", head), ("attention.self.value", head), ("intermediate.dense", neurons)):
        name = f"bert.encoder.layer.1.{part}.bias"
        np.testing.assert_array_equal(ours[name], weights[name][kept], err_msg=name)


@pytest.mark.parametrize(("architecture", "hidden"), [("electra", 16), ("electra", 8), ("albert", 16)])
def test_a_stream_that_is_wider_than_its_embeddings_is_cut_where_they_lie(
    architecture: str, hidden: int, teacher: Callable[[str], Variant], tmp_path: Path
) -> None:
    source = teacher(architecture)
    student = init_student(source, student_shape(TINY, 2, hidden), tmp_path / "student", name="student")
    (theirs, their_bias), (ours, our_bias) = (first_queries(variant) for variant in (source, student))
    kept = [np.flatnonzero(their_bias == value)[0] for value in our_bias]
    assert np.corrcoef(ours.ravel(), theirs[:, kept].ravel())[0, 1] > 0.5


def first_queries(variant: Variant) -> tuple[Any, Any]:
    """What the first layer asks for every token, without its bias, of shape [tokens, hidden]; and the bias."""
    import torch

    model, found = load_torch_model(variant), list[Any]()
    query = next(module for name, module in model.named_modules() if name.endswith(".query"))
    query.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    data = TrainingSet.of(variant, model, TEXTS)
    with torch.inference_mode():
        for row in range(len(TEXTS)):
            model(**data.inputs([row]))
    calls = found[:: len(found) // len(TEXTS)]
    bias = query.bias.detach()
    return torch.cat([call[0] - bias for call in calls]).numpy(), bias.numpy()


def test_a_head_that_was_kept_answers_under_the_labels_it_learnt(
    checkpoint: Callable[[str], Path], teacher: Callable[[str], Variant], tmp_path: Path
) -> None:
    labels = teacher("bert").labels
    turned = import_checkpoint(str(checkpoint("bert")), tmp_path / "turned", new_labels=labels[::-1])
    np.testing.assert_allclose(logits(turned)[:, ::-1], logits(teacher("bert")), atol=1e-6)
    others = import_checkpoint(str(checkpoint("bert")), tmp_path / "others", new_labels=("x", "y", "z"))
    assert np.abs(logits(others) - logits(teacher("bert"))).max() > 1e-3


def test_a_narrow_albert_keeps_the_same_heads_on_both_sides(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    raw, heads = Path(shutil.copytree(checkpoint("albert"), tmp_path / "raw")), slice(16, 32)
    weights, layer = load_file(raw / "model.safetensors"), "albert.encoder.albert_layer_groups.0.albert_layers.0."
    weights[f"{layer}attention.value.weight"][heads] *= 9
    weights[f"{layer}attention.dense.weight"][:, heads] *= 9
    save_file(weights, raw / "model.safetensors", metadata={"format": "pt"})
    source = import_checkpoint(str(raw), tmp_path / "torch-fp32")
    student = init_student(source, student_shape(TINY, 2, 16), tmp_path / "student", name="student")
    ours = load_file(student.path / student.weights)
    np.testing.assert_array_equal(ours[f"{layer}attention.query.bias"], weights[f"{layer}attention.query.bias"][heads])
    kept, left = (weights[f"{layer}attention.dense.weight"][:, columns] for columns in (heads, slice(16)))
    assert np.linalg.norm(ours[f"{layer}attention.dense.weight"]) > 0.4 * np.linalg.norm(kept)
    assert np.linalg.norm(kept) > 5 * np.linalg.norm(left)


def test_neurons_are_weighed_by_their_own_weights_where_those_of_attention_are_as_many(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """In ModernBERT-base there are as many rows of queries, keys and values as of both halves of a gated block."""
    import torch
    from safetensors.numpy import load_file, save_file
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint("modernbert"))
    config = tiny_config("modernbert", len(tokenizer))
    config.intermediate_size = 48
    torch.manual_seed(0)
    raw, neurons = tmp_path / "raw", slice(24, 36)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(raw)
    tokenizer.save_pretrained(raw)
    weights = load_file(raw / "model.safetensors")
    for name in [name for name in weights if "mlp.Wi" in name]:
        weights[name][neurons] *= 3
    for name in [name for name in weights if "attn.Wqkv" in name]:
        weights[name][:24] *= 50
    save_file(weights, raw / "model.safetensors", metadata={"format": "pt"})
    source = import_checkpoint(str(raw), tmp_path / "torch-fp32")
    shape = Shape(layers=2, hidden=32, heads=4, intermediate=12)
    ours = load_file(init_student(source, shape, tmp_path / "student", name="student").path / "model.safetensors")
    for name in [name for name in ours if "mlp.Wi" in name]:
        np.testing.assert_array_equal(ours[name][:12], weights[name][neurons], err_msg=name)


@pytest.mark.parametrize(
    ("shape", "other", "holds"),
    [("3x128", "2x128", True), ("2x128", "2x128", True), ("2x256", "3x128", False), ("2x256f128", "2x128", False)],
)
def test_a_shape_holds_what_is_nowhere_larger(shape: str, other: str, *, holds: bool) -> None:
    (one,), (small,) = parse_shapes(shape, MINILM), parse_shapes(other, MINILM)
    assert one.holds(small) is holds


def test_the_projected_embeddings_keep_as_much_as_their_width_can(
    teacher: Callable[[str], Variant], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    source = teacher("bert")
    student = init_student(source, student_shape(TINY, 2, 16), tmp_path / "student", name="student")
    name = "bert.embeddings.word_embeddings.weight"
    wide, narrow = load_file(source.path / source.weights)[name], load_file(student.path / student.weights)[name]
    singular = np.linalg.svd(wide, compute_uv=False)
    assert np.linalg.norm(narrow) ** 2 == pytest.approx((singular[:16] ** 2).sum(), rel=1e-3)


def test_one_map_narrows_the_whole_model(teacher: Callable[[str], Variant], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    source = teacher("bert")
    student = init_student(source, student_shape(TINY, 2, 16), tmp_path / "student", name="student")
    theirs, ours = load_file(source.path / source.weights), load_file(student.path / student.weights)
    name = "bert.embeddings.word_embeddings.weight"
    directions = np.linalg.lstsq(theirs[name], ours[name], rcond=None)[0]
    np.testing.assert_allclose(directions.T @ directions, np.eye(16), atol=1e-4)
    for name in ("bert.embeddings.position_embeddings.weight", "bert.encoder.layer.0.attention.output.dense.bias",
                 "classifier.weight"):  # fmt: skip
        np.testing.assert_allclose(ours[name], theirs[name] @ directions, atol=1e-4, err_msg=name)
    name = "bert.pooler.dense.weight"
    np.testing.assert_allclose(ours[name], directions.T @ theirs[name] @ directions, atol=1e-4)


def test_a_random_student_follows_its_seed(teacher: Callable[[str], Variant], tmp_path: Path) -> None:
    shape = student_shape(TINY, 1, 16)
    made = [
        init_student(teacher("bert"), shape, tmp_path / str(number), name="student", start="random", seed=seed)
        for number, seed in enumerate((0, 0, 1))
    ]
    assert made[0].digest == made[1].digest != made[2].digest


def test_a_student_from_its_teacher_is_the_same_again(teacher: Callable[[str], Variant], tmp_path: Path) -> None:
    shape = student_shape(TINY, 1, 16)
    made = [init_student(teacher("bert"), shape, tmp_path / name, name="student") for name in ("one", "two")]
    assert made[0].digest == made[1].digest


def test_only_a_torch_variant_has_students(teacher: Callable[[str], Variant], tmp_path: Path) -> None:
    source = teacher("bert")
    onnx = replace(source, manifest=replace(source.manifest, format="onnx"))
    with pytest.raises(ArtifactError, match="a student starts from a torch variant"):
        init_student(onnx, TINY, tmp_path / "student", name="student")
    assert not (tmp_path / "student").exists()
