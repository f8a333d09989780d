"""The transfer set: what new texts are made of, that they are new, and that they keep away from what is held out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from conftest import WORDS, labelled_rows
from hasten import transfer
from hasten.checkpoint import import_checkpoint
from hasten.errors import UsageError
from hasten.transfer import (
    TransferOptions,
    make_transfer_set,
    nearest_neighbours,
    nearly_equal_rows,
    neighbours_in,
)
from hasten.workload import normalised

TRAIN = [text for text, _ in labelled_rows(30, seed=3)]
NEIGHBOURS = {"great": ["lovely", "warm"], "awful": ["dull"]}
TEXTS = st.lists(st.text(alphabet="abc XYZ", min_size=1, max_size=30), min_size=1, max_size=12)


def made(options: TransferOptions, train: list[str] = TRAIN, **more: Any) -> Any:
    given: dict[str, Any] = {"unlabelled": [], "guarded": [], "neighbours": NEIGHBOURS} | more
    return make_transfer_set(train, given["unlabelled"], given["guarded"], given["neighbours"], options)


@given(TEXTS, TEXTS, TEXTS, st.integers(0, 3))
@settings(max_examples=60)
def test_every_text_is_new_and_keeps_away(
    train: list[str], unlabelled: list[str], guarded: list[str], seed: int
) -> None:
    options = TransferOptions(augment=2, seed=seed)
    found = make_transfer_set(train, unlabelled, guarded, NEIGHBOURS, options)
    keys = [normalised(text) for text in found.texts]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & {normalised(text) for text in (*train, *guarded)}
    assert all(keys)
    ways = {way: found.counts.get(way, 0) for way in ("unlabelled", "replace", "recombine", "truncate")}
    assert sum(ways.values()) == len(found.texts)
    assert len(found.texts) - ways["unlabelled"] <= 2 * len(train)
    assert found == make_transfer_set(train, unlabelled, guarded, NEIGHBOURS, options)


def test_the_unlabelled_texts_come_first_and_doubles_are_counted() -> None:
    found = made(TransferOptions(), unlabelled=["one", "two", " ONE ", TRAIN[0]])
    assert found.texts == ("one", "two")
    assert found.counts == {"unlabelled": 2, "duplicates": 2, "guarded": 0}


def test_nothing_is_made_unless_it_is_asked_for() -> None:
    assert made(TransferOptions()).texts == ()


def test_as_many_as_asked_for_in_every_way() -> None:
    colours = {word: [w for w in group if w != word] for group in WORDS.values() for word in group}
    found = made(TransferOptions(augment=3), neighbours=colours)
    assert len(found.texts) == 90
    assert all(found.counts[way] > 10 for way in ("replace", "recombine", "truncate"))
    assert made(TransferOptions(augment=3, seed=1), neighbours=colours).texts != found.texts


def test_what_is_made_consists_of_the_training_texts() -> None:
    words = [text.split() for text in TRAIN]
    for text in made(TransferOptions(augment=3), neighbours={}).texts:
        new = text.split()
        truncated = any(new == old[i : i + len(new)] for old in words for i in range(len(old)))
        starts = {len(new[:i]) for old in words for i in range(len(new) + 1) if new[:i] == old[:i]}
        ends = {i for old in words for i in range(len(new) + 1) if new[i:] == old[len(old) - len(new[i:]) :]}
        assert truncated or starts & ends


def test_only_neighbours_take_a_words_place() -> None:
    options = TransferOptions(augment=1, replace_share=1.0)
    found = make_transfer_set(["a great day", "an awful night"], [], [], NEIGHBOURS, options).texts
    whole = {text for text in found if len(text.split()) == 3}
    assert whole & {"a lovely day", "a warm day", "an dull night"}


def test_what_nearly_equals_a_held_out_text_is_left_out_and_counted() -> None:
    held = "The delivery came two days late, but the support team was friendly."
    near = ["the delivery came two days late but the support team was friendly", held.upper(), f"  {held} "]
    far = ["The delivery came on time.", "Something else entirely."]
    found = made(TransferOptions(), unlabelled=[*near[:1], *far], guarded=[held])
    assert found.texts == tuple(far)
    assert found.counts["guarded"] == 1
    assert nearly_equal_rows([*near, *far], [held], 0.9) == {0, 1, 2}
    assert nearly_equal_rows([*near, *far], [], 0.9) == set()


def test_the_similarity_is_the_one_that_was_asked_for_in_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BLOCK_TEXTS", 2)
    texts = ["zzz", "yyy", "qqq", "abcdefghix"]
    assert nearly_equal_rows(texts, ["abcdefghij"], 0.89) == {3}
    assert nearly_equal_rows(texts, ["abcdefghij"], 0.91) == set()


def test_new_texts_keep_away_from_what_is_held_out() -> None:
    held = list(made(TransferOptions(augment=3)).texts[::10])
    kept = made(TransferOptions(augment=3), guarded=held)
    assert kept.counts["guarded"] >= len(held)
    assert not nearly_equal_rows(list(kept.texts), held, TransferOptions().nearly_equal)


@given(st.text(min_size=3, max_size=40), st.text(max_size=40))
@settings(max_examples=80)
def test_a_held_out_text_is_always_near_itself(text: str, other: str) -> None:
    assert nearly_equal_rows([f" {text}"], [other, text], 1.0) == {0}


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_neighbours_are_the_nearest_by_cosine(
    checkpoint: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    from tokenizers import Tokenizer

    from hasten.torch_runtime import load_torch_model

    teacher = import_checkpoint(str(checkpoint(architecture)), tmp_path / "torch-fp32")
    tokenizer = Tokenizer.from_file(str(teacher.path / "tokenizer.json"))
    table = load_torch_model(teacher).get_input_embeddings().weight.detach().numpy()
    found = neighbours_in(teacher, ["Great food, GREAT", "unheardof"], 4)
    assert set(found) == {"great"}
    words = [name for name in tokenizer.get_vocab() if name.isalpha()]
    places = [tokenizer.token_to_id(word) for word in words]
    distances = cdist(table[[tokenizer.token_to_id("great")]], table[places], metric="cosine")[0]
    nearest = [words[place] for place in np.argsort(distances, kind="stable")]
    assert found["great"] == [word for word in nearest if word != "great"][:4]
    assert len(WORDS["good"]) > 4


def test_a_word_of_several_tokens_has_no_neighbours(checkpoint: Callable[[str], Path]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint("bert") / "tokenizer.json"))
    table = np.random.default_rng(0).standard_normal((tokenizer.get_vocab_size(), 8)).astype(np.float32)
    assert nearest_neighbours(["qzx", "great", "!!"], tokenizer, table, 3).keys() == {"great"}


@pytest.mark.parametrize(
    "options",
    [{"augment": -1}, {"augment": 1e9}, {"replace_share": 1.5}, {"nearly_equal": 0}, {"neighbours": 0}],
)
def test_options_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TransferOptions(**options)
