"""WordPiece of plain text, by a library that takes a fraction of the time; the same ids, or none.

`tokenizers` keeps track of where each character came from, which takes most of its time and which nobody asks for here.
tokie does not. The two part where control characters, added tokens and the far ends of Unicode's tables come in, so
only text without any of these is given to it, only for BERT's WordPiece, and only once it has been seen to read the
vocabulary and every plain character alike. Special tokens and truncation stay hasten's, so nothing depends on what
tokie makes of a `tokenizer.json` beyond words.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from hasten.files import file_sha256

MOST_CHARACTERS = 3_000  # tokie shares out texts of far more bytes among threads, and cuts words where they meet
ASCII = "".join(map(chr, range(32, 127))) + "\t\n\r"
_LATIN = (*range(0xA0, 0x250), *range(0x2010, 0x2028), 0x20AC)  # with dashes, quotation marks and the euro sign
LATIN = "".join(chr(number) for number in _LATIN if number == 0xA0 or chr(number).isprintable())
LETTERS = "aeionrstlcdhmpug"
MOST_READERS = 8  # kept, of a few MB each

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """What reads the plain texts of one `tokenizer.json`.

    Attributes:
        words: Token ids of a plain text's words, however many.
        is_plain: Matches plain texts.
        before: Ids of the special tokens in front of a text.
        after: Ids of those behind it.
    """

    words: Callable[[str], list[int]]
    is_plain: Callable[[str], Any]
    before: list[int]
    after: list[int]


class PlainText:
    """Plain texts to token ids, special tokens included."""

    def __init__(self, reader: _Reader, *, max_tokens: int, side: Literal["left", "right"]) -> None:
        """Takes a reader, the longest result with special tokens, and the side on which longer texts are cut."""
        self._words, self._is_plain = reader.words, reader.is_plain
        self._before, self._after = reader.before, reader.after
        self._room, self._cut_left = max(0, max_tokens - len(self._before) - len(self._after)), side == "left"

    def __call__(self, text: str) -> list[int] | None:
        """Token ids of a text; None where only the tokenizer itself can tell."""
        if len(text) > MOST_CHARACTERS or not self._is_plain(text):
            return None
        ids = self._words(text)
        if len(ids) > self._room:
            ids = ids[len(ids) - self._room :] if self._cut_left else ids[: self._room]
        return [*self._before, *ids, *self._after]


def plain_text(path: Path, *, max_tokens: int, side: Literal["left", "right"]) -> PlainText | None:
    """The faster way for a tokenizer, where there is one.

    Args:
        path: The `tokenizer.json`.
        max_tokens: Longest result, special tokens included.
        side: Where longer texts are cut.

    Returns:
        None for anything but BERT's WordPiece with segment 0 throughout, and where tokie cannot read the file, or reads
        it in another way, which is logged.
    """
    reader = _reader(str(path), file_sha256(path))
    return None if reader is None else PlainText(reader, max_tokens=max_tokens, side=side)


@lru_cache(maxsize=MOST_READERS)
def _reader(path: str, digest: str) -> _Reader | None:  # noqa: ARG001, the digest tells one content from the next
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if not _is_berts(tokenizer):
        return None
    try:
        reader = _opened(path, tokenizer)
        word = _read_otherwise(reader, tokenizer)
    except Exception as error:  # neither library says what it raises
        log.warning("%s: texts are tokenized without tokie, which fails on it: %s", path, error)
        return None
    if word is not None:
        log.warning("%s: texts are tokenized without tokie, which reads %r in another way", path, word)
        return None
    return reader


def _is_berts(tokenizer: Any) -> bool:
    from tokenizers import models, normalizers, pre_tokenizers

    parts = (
        (tokenizer.normalizer, normalizers.BertNormalizer),
        (tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer),
        (tokenizer.model, models.WordPiece),
    )
    return all(isinstance(part, kind) for part, kind in parts)


def _opened(path: str, tokenizer: Any) -> _Reader:
    """The reader, with what the tokenizer puts around a text."""
    import tokie

    fast: Any = tokie.Tokenizer.from_json(path)
    fast.no_padding()
    fast.no_truncation()
    letter = _letter(tokenizer)
    (word,), frame = tokenizer.encode(letter, add_special_tokens=False).ids, tokenizer.encode(letter)
    if any(frame.type_ids):
        raise ValueError("its special tokens have segments of their own")
    place = frame.ids.index(word)
    return _Reader(
        words=lambda text: fast.encode(text, add_special_tokens=False).ids, is_plain=_plain(tokenizer).fullmatch,
        before=frame.ids[:place], after=frame.ids[place + 1 :],
    )  # fmt: skip


def _letter(tokenizer: Any) -> str:
    """A plain letter that is a word of the vocabulary, for what is read behind a letter."""
    plain, known = _plain(tokenizer).fullmatch, tokenizer.get_vocab(with_added_tokens=False)
    found = next((letter for letter in LETTERS if letter in known and plain(letter)), None)
    if found is None:
        raise ValueError(f"none of the letters {LETTERS} is a plain word of its vocabulary")
    return found


def _plain(tokenizer: Any) -> re.Pattern[str]:
    """Matches texts of plain characters, without those that an added token begins with.

    Letters beyond ASCII are plain where the normalizer lowers them and takes their accents off.
    """
    bert = tokenizer.normalizer
    plain = ASCII + LATIN * (bert.lowercase and bert.strip_accents is not False)
    tokens = [added.content for added in tokenizer.get_added_tokens_decoder().values()]
    begins = {case for token in tokens for case in (token[:1].lower(), token[:1].upper())}
    return re.compile(f"[{re.escape(''.join(sorted(set(plain) - begins)))}]*")


def _read_otherwise(reader: _Reader, tokenizer: Any) -> str | None:
    """The first plain word to which the two give different ids, alone or in its special tokens."""
    probes = list(_probes(tokenizer))
    expected = tokenizer.encode_batch_fast(probes)
    for text, known in zip(probes, expected, strict=True):
        if [*reader.before, *reader.words(text), *reader.after] != known.ids:
            return text
    return None


def _probes(tokenizer: Any) -> Iterator[str]:
    """Plain texts: every character alone, behind, before and between letters; words as long as may be; the vocabulary.

    Where a word's rest begins no entry at all, tokie gives what came before it; the characters behind a letter show it.
    """
    plain, letter = _plain(tokenizer).fullmatch, _letter(tokenizer)
    model = tokenizer.model
    for one in filter(plain, ASCII + LATIN):
        yield from (one, f"{letter}{one}", f"{one}{letter}", f"{letter}{one}{letter} {one} {letter}")
    longest = model.max_input_chars_per_word
    yield from (letter * length for length in range(max(1, longest - 1), longest + 2) if length <= MOST_CHARACTERS)
    for entry in tokenizer.get_vocab(with_added_tokens=False):
        ending = entry.startswith(model.continuing_subword_prefix)
        word = f"{letter}{entry.removeprefix(model.continuing_subword_prefix)}" if ending else entry
        if plain(word):
            yield word
