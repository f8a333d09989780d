"""WordPiece of plain text, by a library that takes a fraction of the time; the same ids, or none.

`tokenizers` keeps track of where each character came from, which takes most of its time and which nobody asks for here.
tokie does not. The two part where control characters, added tokens and the far ends of Unicode's tables come in, so
only text without any of these is given to it, only for BERT's WordPiece, and only once it has been seen to read the
vocabulary and every plain character alike.
Special tokens and truncation stay hasten's, so nothing depends on what tokie makes of a `tokenizer.json` beyond words.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

MOST_CHARACTERS = 5_000  # tokie shares out far longer texts among threads, and cuts words where they meet
ASCII = "".join(map(chr, range(32, 127))) + "\t\n\r"
_LATIN = (*range(0xA0, 0x250), *range(0x2010, 0x2028), 0x20AC)  # with dashes, quotation marks and the euro sign
LATIN = "".join(chr(number) for number in _LATIN if number == 0xA0 or chr(number).isprintable())
PROBE_WORDS = 200

log = logging.getLogger(__name__)


class PlainText:
    """Plain texts to token ids, special tokens included."""

    def __init__(self, path: Path, tokenizer: Any, *, max_tokens: int, side: Literal["left", "right"]) -> None:
        """Takes over from a tokenizer what it is sure to do alike.

        Args:
            path: The `tokenizer.json`.
            tokenizer: The same as a `tokenizers.Tokenizer` that neither truncates nor pads.
            max_tokens: Longest result, special tokens included; at least their number.
            side: Where longer texts are cut.
        """
        import tokie

        self._words: Any = tokie.Tokenizer.from_json(str(path))
        self._words.no_padding()
        self._words.no_truncation()
        self._is_plain = _plain(tokenizer).fullmatch
        alone, within = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
        begin = next(at for at in range(len(within.ids)) if within.ids[at:][: len(alone.ids)] == alone.ids)
        self._before, self._after = within.ids[:begin], within.ids[begin + len(alone.ids) :]
        self._room, self._cut_left = max_tokens - len(self._before) - len(self._after), side == "left"

    def __call__(self, text: str) -> list[int] | None:
        """Token ids of a text; None where only the tokenizer itself can tell."""
        if (ids := self.words(text)) is None:
            return None
        if len(ids) > self._room:
            ids = ids[len(ids) - self._room :] if self._cut_left else ids[: self._room]
        return [*self._before, *ids, *self._after]

    def words(self, text: str) -> list[int] | None:
        """Token ids of its words alone, however many; None where only the tokenizer itself can tell."""
        if len(text) > MOST_CHARACTERS or not self._is_plain(text):
            return None
        return self._words.encode(text, add_special_tokens=False).ids


def plain_text(path: Path, tokenizer: Any, *, max_tokens: int, side: Literal["left", "right"]) -> PlainText | None:
    """The faster way for a tokenizer, where there is one.

    Args:
        path: The `tokenizer.json`.
        tokenizer: The same as a `tokenizers.Tokenizer` that neither truncates nor pads.
        max_tokens: Longest result, special tokens included.
        side: Where longer texts are cut.

    Returns:
        None for anything but BERT's WordPiece with segment 0 throughout, and for a vocabulary that tokie reads in
        another way, which is logged.
    """
    if not _is_berts(tokenizer):
        return None
    found = PlainText(path, tokenizer, max_tokens=max_tokens, side=side)
    probes = list(_probes(tokenizer))
    for text, known in zip(probes, tokenizer.encode_batch_fast(probes, add_special_tokens=False), strict=True):
        if found.words(text) not in (None, known.ids):
            log.warning("%s: tokie reads %r in another way; texts are tokenized without it", path, text[:80])
            return None
    return found


def _is_berts(tokenizer: Any) -> bool:
    from tokenizers import models, normalizers, pre_tokenizers

    parts = (
        (tokenizer.normalizer, normalizers.BertNormalizer),
        (tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer),
    )
    berts = all(isinstance(part, kind) for part, kind in parts) and isinstance(tokenizer.model, models.WordPiece)
    return berts and not any(tokenizer.encode("a").type_ids)


def _plain(tokenizer: Any) -> re.Pattern[str]:
    """Matches texts of plain characters, without those that an added token begins with.

    Letters beyond ASCII are plain where the normalizer lowers them and takes their accents off.
    """
    bert = tokenizer.normalizer
    plain = ASCII + LATIN * (bert.lowercase and bert.strip_accents is not False)
    tokens = [added.content for added in tokenizer.get_added_tokens_decoder().values()]
    begins = {case for token in tokens for case in (token[:1].lower(), token[:1].upper())}
    return re.compile(f"[{re.escape(''.join(sorted(set(plain) - begins)))}]*")


def _probes(tokenizer: Any) -> Iterator[str]:
    """A vocabulary's plain words (endings behind a letter), the plain characters, words of about the longest length."""
    plain, prefix = _plain(tokenizer).fullmatch, tokenizer.model.continuing_subword_prefix
    words = sorted(word for word in tokenizer.get_vocab(with_added_tokens=False) if plain(word))
    words = [f"a{word.removeprefix(prefix)}" if word.startswith(prefix) else word for word in words]
    longest = tokenizer.model.max_input_chars_per_word
    yield from (f"{'a' * length} a" for length in range(max(1, longest - 1), longest + 2))
    yield from (f"{one} a{one} {one}a a{one}a" for one in ASCII + LATIN if plain(one))
    for start in range(0, len(words), PROBE_WORDS):
        yield " ".join(words[start : start + PROBE_WORDS])
