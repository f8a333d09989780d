"""Plain text by tokie against its oracle, the `tokenizers` library: the same ids, or none."""

from __future__ import annotations

import logging
import string
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
KINDS = ("bert", "cased", "roberta's frame", "short words", "other endings")
MOST_TOKENS = 12

text_like = st.one_of(
    st.text(st.sampled_from(ASCII + LATIN)), st.text(), st.lists(st.sampled_from([*WORDS, "\n", " \t "])).map(" ".join)
)


def vocabulary_of(tokenizer: Any, endings: str = "##") -> dict[str, int]:
    known = tokenizer.get_vocab(with_added_tokens=False)
    return {word.replace("##", endings, 1): number for word, number in known.items()}


def tokenizer_of(kind: str, folder: Path, changed: Callable[[Any], None] | None = None) -> tuple[Path, Any]:
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
        tokenizer.model = models.WordPiece(vocabulary_of(tokenizer), unk_token="[UNK]", max_input_chars_per_word=4)
    elif kind == "other endings":
        tokenizer.model = models.WordPiece(
            vocabulary_of(tokenizer, "@@"), unk_token="[UNK]", continuing_subword_prefix="@@"
        )
    if changed is not None:
        changed(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(path))
    return path, tokenizer


def read(path: Path, side: Literal["left", "right"] = "right") -> PlainText | None:
    return plain_text(path, max_tokens=MOST_TOKENS, side=side)


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PlainText, PlainText, Any]:
    path, tokenizer = tokenizer_of(request.param, tmp_path_factory.mktemp("tokenizer"))
    right, left = read(path), read(path, "left")
    assert right is not None
    assert left is not None
    return right, left, tokenizer


def by_library(tokenizer: Any, text: str, side: Literal["left", "right"] = "right") -> list[int]:
    tokenizer.enable_truncation(MOST_TOKENS, direction=side)
    return tokenizer.encode(text).ids


@given(text=text_like)
def test_ids_are_those_of_tokenizers_or_none(both: tuple[PlainText, PlainText, Any], text: str) -> None:
    right, left, tokenizer = both
    assert right(text) in (None, by_library(tokenizer, text))
    assert left(text) in (None, by_library(tokenizer, text, "left"))


def test_letters_with_accents_are_plain_where_they_are_taken_off(both: tuple[PlainText, PlainText, Any]) -> None:
    normalizer = both[2].normalizer
    for text in ("“Très bien” – naïve café, 5 €…", LATIN.replace(" ", "")[:100], "“”" * (MOST_CHARACTERS // 2)):
        assert both[0](text) == (by_library(both[2], text) if normalizer.lowercase else None)


@pytest.mark.parametrize("text", ["", " ", "great", "A great\tday,\nisn't it? 100% {ok} ~", "x" * 200, "a " * 1_500])
def test_plain_text_takes_the_short_way(both: tuple[PlainText, PlainText, Any], text: str) -> None:
    assert both[0](text) == by_library(both[2], text)


@pytest.mark.parametrize(
    "text", ["cafe\u0301", "\xad", "\u200d", "a\x00b", "\x7f", "中文", "[SEP]", "say [mask]", "a " * 1_501, "\ud800"]
)
def test_anything_else_is_left_to_the_library(both: tuple[PlainText, PlainText, Any], text: str) -> None:
    assert both[0](text) is None


def test_every_character_alone_and_between(both: tuple[PlainText, PlainText, Any]) -> None:
    right, _, tokenizer = both
    for character in (*map(chr, range(128)), *LATIN):
        for text in (character, f"a{character}b", f"a {character} b"):
            assert right(text) in (None, by_library(tokenizer, text)), text


def test_threads_do_not_disturb_each_other(both: tuple[PlainText, PlainText, Any]) -> None:
    texts = [" ".join(WORDS[number % 6 :] * (number % 4)) + " great" for number in range(200)]
    alone = [both[0](text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(both[0], texts)) == alone


def set_part(name: str) -> Callable[[Any], None]:
    from tokenizers import models, normalizers, pre_tokenizers

    def changed(tokenizer: Any) -> None:
        others: dict[str, Callable[[], Any]] = {
            "normalizer": normalizers.Lowercase,
            "pre_tokenizer": pre_tokenizers.Whitespace,
            "model": lambda: models.WordLevel(vocabulary_of(tokenizer), unk_token="[UNK]"),
        }
        setattr(tokenizer, name, others[name]())

    return changed


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "model"])
def test_only_berts_wordpiece_has_a_short_way(tmp_path: Path, part: str) -> None:
    assert read(tokenizer_of("bert", tmp_path, set_part(part))[0]) is None


@pytest.mark.parametrize("token", ["a-team", "#tag", "Zebra"])
def test_a_text_with_a_character_that_an_added_token_begins_with_is_left_to_the_library(
    tmp_path: Path, token: str
) -> None:
    path, tokenizer = tokenizer_of("bert", tmp_path, lambda tokenizer: tokenizer.add_tokens([token]))
    found = read(path)
    assert found is not None
    for text in (f"the {token}", f"the {token.lower()}", f"the {token.upper()}"):
        assert found(text) is None
    for text in ("the fun 3.14", "hotel, gross"):
        assert found(text) in (None, by_library(tokenizer, text))


def without_endings(tokenizer: Any) -> None:
    """No `##c`, but `##cat`: after the words that begin so, tokie stops where the library knows none of the word."""
    from tokenizers import models

    known = {"##cat" if word == "##c" else word: number for word, number in vocabulary_of(tokenizer).items()}
    tokenizer.model = models.WordPiece(known, unk_token="[UNK]")


def without_letters(tokenizer: Any) -> None:
    from tokenizers import models

    known = {word: number for word, number in vocabulary_of(tokenizer).items() if word not in string.ascii_lowercase}
    tokenizer.model = models.WordPiece(known, unk_token="[UNK]")


def without_unknown(tokenizer: Any) -> None:
    from tokenizers import models

    tokenizer.model = models.WordPiece(vocabulary_of(tokenizer), unk_token="[NOTHING]")


def with_segments(tokenizer: Any) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (without_endings, "reads 'aC' in another way"),
        (without_letters, "none of the letters"),
        (without_unknown, "fails on it"),
        (with_segments, "segments of their own"),
    ],
)
def test_what_is_not_sure_is_left_to_the_library_and_said(
    tmp_path: Path, changed: Callable[[Any], None], complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = tokenizer_of("bert", tmp_path, changed)
    with caplog.at_level(logging.WARNING):
        assert read(path) is None
    assert complaint in caplog.text


def test_a_tokenizer_that_changes_is_read_again(tmp_path: Path) -> None:
    path, _ = tokenizer_of("bert", tmp_path)
    assert read(path) is not None
    tokenizer_of("bert", tmp_path, set_part("model"))
    assert read(path) is None
