"""Which layers a student starts from, on a teacher one layer of which does nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import labelled_rows
from hasten.checkpoint import import_checkpoint
from hasten.errors import DataError
from hasten.layer_choice import layer_influences, most_influential
from hasten.students import init_student, shape_of, stand_for
from hasten.torch_runtime import load_torch_model
from hasten.variant import Variant, building, copy_configuration, open_variant, seal

TEXTS = [text for text, _ in labelled_rows(20, seed=2)]


@pytest.fixture(scope="module")
def idle_last(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """A BERT of two layers whose last one hands on what it gets."""
    return with_idle_last("bert", checkpoint, tmp_path_factory.mktemp("idle"))


def with_idle_last(architecture: str, checkpoint: Callable[[str], Path], folder: Path) -> Variant:
    source = import_checkpoint(str(checkpoint(architecture)), folder / "whole")
    model = load_torch_model(source)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if re.search(r"layers?\.1\..*(output\.dense|Wo)", name):
                weight.zero_()
    with building(folder / "idle") as draft:
        copy_configuration(source, draft)
        model.save_pretrained(draft)
        seal(draft, source.manifest)
    return open_variant(folder / "idle")


def test_a_layer_that_hands_on_what_it_gets_has_the_least_influence(idle_last: Variant) -> None:
    first, last = layer_influences(idle_last, TEXTS)
    assert first > 5 * abs(last)


def test_a_norm_behind_the_last_layer_is_not_taken_for_its_work(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    first, last = layer_influences(with_idle_last("modernbert", checkpoint, tmp_path), TEXTS)
    assert last == pytest.approx(0, abs=1e-6)
    assert first > 1e-3


def test_a_student_starts_from_the_others_and_says_so(idle_last: Variant, tmp_path: Path) -> None:
    (layer,) = layers = most_influential(layer_influences(idle_last, TEXTS), 1)
    assert layer == 0
    shape = replace(shape_of(idle_last), layers=1)
    student = init_student(idle_last, shape, tmp_path / "student", name="student", layers=layers)
    theirs, ours = (load_torch_model(v).state_dict() for v in (idle_last, student))
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(theirs[name], ours[name])
    assert stand_for(idle_last, student) == (0,)
    spaced = init_student(idle_last, shape, tmp_path / "spaced", name="spaced")
    assert stand_for(idle_last, spaced) == (1,)


def test_the_chosen_keep_their_order() -> None:
    assert most_influential([0.3, 0.9, 0.1, 0.4], 3) == [0, 1, 3]
    assert most_influential([0.5, 0.5, 0.5], 2) == [0, 1]


def test_texts_are_needed(idle_last: Variant) -> None:
    with pytest.raises(DataError, match="none were given"):
        layer_influences(idle_last, [])
