"""Plain text by tokie against its oracle, the `tokenizers` library: the same ids, or none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_tokenizer
from hasten.plain_text import ASCII, LATIN, MOST_CHARACTERS, PlainText, plain_text

WORDS = [
    "great",
    "the",
    "a1b2",
    "don't",
    "3.14",
    "...",
    "x" * 99,
    "x" * 100,
    "x" * 101,
    "[SEP]",
    "[sep]",
    "<mask>",
    "##a",
]
KINDS = ("bert", "cased", "roberta's frame", "short words")
MOST_TOKENS = 12

text_like = st.one_of(
    st.text(st.sampled_from(ASCII + LATIN)), st.text(), st.lists(st.sampled_from([*WORDS, "\n", " \t "])).map(" ".join)
)


def tokenizer_of(kind: str, folder: Path) -> tuple[Path, Any]:
    """A `tokenizer.json` of a kind, and the same opened by the library."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, processors

    make_tokenizer(folder)
    path = folder / "tokenizer.json"
    tokenizer: Any = Tokenizer.from_file(str(path))
    if kind == "cased":
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, clean_text=False)
    elif kind == "roberta's frame":
        tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
        tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("</s>", normalized=True)])
    elif kind == "short words":
        tokenizer.model = models.WordPiece(
            tokenizer.get_vocab(with_added_tokens=False), unk_token="[UNK]", max_input_chars_per_word=4
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(path))
    return path, tokenizer


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PlainText, PlainText, Any]:
    path, tokenizer = tokenizer_of(request.param, tmp_path_factory.mktemp("tokenizer"))
    right, left = (plain_text(path, tokenizer, max_tokens=MOST_TOKENS, side=side) for side in ("right", "left"))
    assert right is not None
    assert left is not None
    return right, left, tokenizer


def by_library(tokenizer: Any, text: str, side: Literal["left", "right"]) -> list[int]:
    tokenizer.enable_truncation(MOST_TOKENS, direction=side)
    return tokenizer.encode(text).ids


@given(text=text_like)
def test_ids_are_those_of_tokenizers_or_none(both: tuple[PlainText, PlainText, Any], text: str) -> None:
    right, left, tokenizer = both
    assert right(text) in (None, by_library(tokenizer, text, "right"))
    assert left(text) in (None, by_library(tokenizer, text, "left"))


def test_letters_with_accents_are_plain_where_they_are_taken_off(both: tuple[PlainText, PlainText, Any]) -> None:
    normalizer = both[2].normalizer
    for text in ("“Très bien” – naïve café, 5 €…", LATIN.replace(" ", "")[:100]):
        assert both[0](text) == (by_library(both[2], text, "right") if normalizer.lowercase else None)


@pytest.mark.parametrize("text", ["", " ", "great", "A great\tday,\nisn't it? 100% {ok} ~", "x" * 200, "a " * 2_000])
def test_plain_text_takes_the_short_way(both: tuple[PlainText, PlainText, Any], text: str) -> None:
    assert both[0](text) == by_library(both[2], text, "right")


@pytest.mark.parametrize(
    "text",
    ["cafe\u0301", "\xad", "\u200d", "a\x00b", "\x7f", "中文", "[SEP]", "say [mask]", "a " * MOST_CHARACTERS, "\ud800"],
)
def test_anything_else_is_left_to_the_library(both: tuple[PlainText, PlainText, Any], text: str) -> None:
    assert both[0](text) is None


def test_every_character_alone_and_between(both: tuple[PlainText, PlainText, Any]) -> None:
    right, _, tokenizer = both
    for character in (*map(chr, range(128)), *LATIN):
        for text in (character, f"a{character}b", f"a {character} b"):
            assert right(text) in (None, by_library(tokenizer, text, "right")), text


def test_threads_do_not_disturb_each_other(both: tuple[PlainText, PlainText, Any]) -> None:
    texts = [" ".join(WORDS[number % 6 :] * (number % 4)) + " great" for number in range(200)]
    alone = [both[0](text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(both[0], texts)) == alone


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "model"])
def test_only_berts_wordpiece_has_a_short_way(tmp_path: Path, part: str) -> None:
    from tokenizers import models, normalizers, pre_tokenizers

    path, tokenizer = tokenizer_of("bert", tmp_path)
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    other: dict[str, Callable[[], Any]] = {
        "normalizer": normalizers.Lowercase,
        "pre_tokenizer": pre_tokenizers.Whitespace,
        "model": lambda: models.WordLevel(vocabulary, unk_token="[UNK]"),
    }
    setattr(tokenizer, part, other[part]())
    assert plain_text(path, tokenizer, max_tokens=MOST_TOKENS, side="right") is None


def test_a_vocabulary_that_is_read_otherwise_is_left_to_the_library(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = tokenizer_of("bert", tmp_path)
    (tmp_path / "other").mkdir()
    _, other = tokenizer_of("short words", tmp_path / "other")
    with caplog.at_level(logging.WARNING):
        assert plain_text(path, other, max_tokens=MOST_TOKENS, side="right") is None
    assert "tokie reads" in caplog.text
