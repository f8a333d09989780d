"""Rows of a workload: split off, freed of those that stand elsewhere, drawn."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import DataError
from hasten.workload import (
    Workload,
    normalised,
    random_rows,
    some_rows,
    split,
    without_overlap,
)


def workload(texts: list[str], labels: list[int], name: str = "train") -> Workload:
    return Workload(name=name, source="memory", texts=tuple(texts), labels=tuple(labels))


def many(sizes: tuple[int, ...]) -> Workload:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    return workload([f"text {row}" for row in range(len(labels))], labels)


def test_the_digest_tells_rows_apart() -> None:
    made = workload(["a", "b"], [0, 1])
    assert made.digest == workload(["a", "b"], [0, 1]).digest
    others = [workload(["b", "a"], [1, 0]), workload(["a", "b"], [1, 0]), workload(["a\n1\t1\tb"], [0])]
    assert made.digest not in {other.digest for other in others}
    assert workload(["\ud800", "a"], [0, 1]).digest


def test_a_split_is_stratified_and_disjoint() -> None:
    source = many((600, 300, 100))
    rest, held = split(source, share=0.2, seed=0)
    assert (rest.name, held.name, len(rest), len(held)) == ("train", "valid", 800, 200)
    assert Counter(held.labels) == {0: 120, 1: 60, 2: 20}
    assert not set(rest.texts) & set(held.texts)
    pairs = set(zip(source.texts, source.labels, strict=True))
    assert {*zip(rest.texts, rest.labels, strict=True), *zip(held.texts, held.labels, strict=True)} == pairs


def test_a_split_follows_its_seed() -> None:
    source = many((60, 40))
    assert split(source, share=0.3, seed=1) == split(source, share=0.3, seed=1)
    assert split(source, share=0.3, seed=1)[1].texts != split(source, share=0.3, seed=2)[1].texts


def test_a_split_of_labels_with_gaps() -> None:
    source = workload([f"text {i}" for i in range(20)], [0] * 10 + [5] * 10)
    _, held = split(source, share=0.5, seed=0)
    assert Counter(held.labels) == {0: 5, 5: 5}


def test_a_class_with_one_row_cannot_be_split() -> None:
    with pytest.raises(DataError, match="label id 2 has one text; give --valid"):
        split(many((10, 10, 1)), share=0.2, seed=0)


def test_too_few_texts_for_the_classes_cannot_be_split() -> None:
    with pytest.raises(DataError, match="cannot split 6 texts for validation"):
        split(many((2, 2, 2)), share=0.9, seed=0)


def test_a_small_share_of_many_classes_has_one_text_of_each() -> None:
    rest, held = split(many((10,) * 50), share=0.02, seed=0)
    assert (sorted(held.labels), len(rest)) == (list(range(50)), 450)


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["", " ", "  "])), min_size=40, max_size=60))
@settings(max_examples=30)
def test_rows_of_one_text_stay_together(drawn: list[tuple[int, str]]) -> None:
    rows = [*drawn, *((number, "") for number in range(10))]
    source = workload([f"text{space}{number}" for number, space in rows], [number % 2 for number, _ in rows])
    rest, held = split(source, share=0.3, seed=0)
    assert not {normalised(text) for text in rest.texts} & {normalised(text) for text in held.texts}
    assert Counter(rest.texts) + Counter(held.texts) == Counter(source.texts)


words = st.lists(st.sampled_from(["a", "A", " a ", "b", "B b", "b  b", "ß", "SS", "c"]), min_size=1, max_size=12)


@given(words, words, words)
@settings(max_examples=100)
def test_without_overlap_leaves_nothing_common_and_loses_nothing_else(
    train: list[str], valid: list[str], test: list[str]
) -> None:
    source = workload(train, list(range(len(train))))
    others = workload(valid, [0] * len(valid), "valid"), workload(test, [0] * len(test), "test")
    kept, removed = without_overlap(source, *others)
    taken = {normalised(text) for text in (*valid, *test)}
    assert not taken & {normalised(text) for text in kept.texts}
    assert {normalised(text) for text in removed} <= taken
    assert set(kept.texts) | set(removed) == set(train)
    assert not set(kept.texts) & set(removed)
    assert len(removed) == len(set(removed))
    assert list(kept.labels) == sorted(kept.labels)
    assert kept.texts == tuple(train[row] for row in kept.labels)
    assert without_overlap(kept, *others) == (kept, [])


def test_case_and_spacing_do_not_make_another_text() -> None:
    assert normalised("  Hello \n WORLD ") == normalised("hello world")
    assert normalised("hello, world") != normalised("hello world")
    assert normalised("caf\N{LATIN SMALL LETTER E WITH ACUTE}") == normalised("cafe\N{COMBINING ACUTE ACCENT}")


def test_without_overlap_of_nothing_is_the_same() -> None:
    source = workload(["a", "b"], [0, 1])
    assert without_overlap(source) == (source, [])


@given(st.integers(1, 50), st.integers(0, 200), st.integers(0, 5))
@settings(max_examples=50)
def test_random_rows_go_through_all_rows_before_one_comes_again(rows: int, size: int, seed: int) -> None:
    drawn = random_rows(rows, size, seed=seed)
    assert len(drawn) == size
    assert drawn == random_rows(rows, size, seed=seed)
    counts = Counter(drawn)
    assert set(counts) <= set(range(rows))
    assert max(counts.values(), default=0) <= -(-size // rows)
    assert size < rows or min(counts[row] for row in range(rows)) >= size // rows


@given(st.integers(1, 50), st.integers(1, 80), st.integers(0, 99))
def test_some_rows_are_as_many_as_there_are_and_none_twice(rows: int, most: int, seed: int) -> None:
    found = some_rows(rows, most, seed=seed)
    assert len(found) == len(set(found)) == min(rows, most)
    assert set(found) <= set(range(rows))
