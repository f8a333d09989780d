"""Text to rows of token ids, and rows to a rectangular batch: what every runtime shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hasten.errors import ArtifactError, DataError
from hasten.plain_text import MOST_CHARACTERS, plain_text
from hasten.variant import Variant

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """One tokenized text.

    Attributes:
        ids: Token ids, special tokens included; shape [tokens].
        type_ids: Segment ids; shape [tokens].
    """

    ids: list[int]
    type_ids: list[int]

    def __len__(self) -> int:
        """Length in tokens."""
        return len(self.ids)


class TextEncoder:
    """The tokenizer of a variant folder, with hasten's truncation and no padding of its own."""

    def __init__(self, variant: Variant) -> None:
        from tokenizers import Tokenizer

        path = variant.path / "tokenizer.json"
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from error
        self._tokenizer.no_padding()
        configured = _configured(variant, "tokenizer_config.json")
        side = configured.get("truncation_side") or "right"
        named = configured.get("unk_token")
        unknown = named.get("content") if isinstance(named, dict) else named
        self._unknown = self._tokenizer.token_to_id(unknown) if unknown else None
        self._tokenizer.enable_truncation(variant.manifest.max_tokens, direction=side)
        self._plain = plain_text(path, max_tokens=variant.manifest.max_tokens, side=side)

    def __call__(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenizes texts.

        Args:
            texts: The texts.

        Returns:
            One encoding a text, truncated to the model's longest input, at the end that the tokenizer is set to.

        Raises:
            DataError: A text holds a lone surrogate, which no UTF-8 has, or is none.
        """
        try:
            plain = [None if self._plain is None else self._plain(text) for text in texts]
            rest = iter(self._by_library([text for text, ids in zip(texts, plain, strict=True) if ids is None]))
        except TypeError as error:  # what the library makes of text that has no UTF-8
            _check_texts(texts)
            raise DataError(f"the tokenizer takes texts only: {error}") from error
        return [next(rest) if ids is None else _encoding(ids) for ids in plain]

    def plain(self, texts: Sequence[str]) -> list[Encoding] | None:
        """Tokenizes texts where that takes some microseconds in all.

        Args:
            texts: The texts.

        Returns:
            As when called; None where a text is not plain, or where they are long together.
        """
        if self._plain is None or sum(map(len, texts)) > MOST_CHARACTERS:
            return None
        found: list[Encoding] = []
        for text in texts:
            if (ids := self._plain(text)) is None:
                return None
            found.append(_encoding(ids))
        return found

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Share of the texts' tokens that stand for what the vocabulary does not have; 0 for no tokens.

        Args:
            texts: The texts.

        Returns:
            0 to 1. Tokenizers of bytes know every text.
        """
        if self._unknown is None:
            return 0.0
        ids = [i for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False) for i in e.ids]
        return ids.count(self._unknown) / max(1, len(ids))

    def _by_library(self, texts: list[str]) -> list[Encoding]:
        encoded = self._tokenizer.encode_batch_fast(texts) if texts else []
        return [Encoding(ids=e.ids, type_ids=e.type_ids) for e in encoded]


def _encoding(ids: list[int]) -> Encoding:
    """Of a text that stands alone."""
    return Encoding(ids=ids, type_ids=[0] * len(ids))


def _check_texts(texts: Sequence[str]) -> None:
    for text in texts:
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance], what is called wrongly
            raise DataError(f"the tokenizer takes texts only, not {text!r:.80}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"a text is not valid Unicode: {error.reason} at character {error.start}") from error


def pad_token_id(variant: Variant) -> int:
    """The id that fills up shorter rows of a batch, from `config.json`; 0 where it names none."""
    return int(_configured(variant, "config.json").get("pad_token_id") or 0)


def _configured(variant: Variant, name: str) -> dict[str, Any]:
    """What a configuration file of the folder says; nothing where there is none."""
    path = variant.path / name
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.is_file() else {}


def padded(encodings: Sequence[Encoding], pad_id: int) -> dict[str, NDArray[np.int64]]:
    """A rectangular batch, filled up on the right.

    Args:
        encodings: Rows of different lengths.
        pad_id: Token id to fill with.

    Returns:
        `MODEL_INPUTS` by name; each of shape [batch, longest tokens].
    """
    shape = (len(encodings), max((len(e) for e in encodings), default=0) or 1)
    ids = np.full(shape, pad_id, dtype=np.int64)
    mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding)] = encoding.ids
        mask[row, : len(encoding)] = 1
        types[row, : len(encoding)] = encoding.type_ids
    return dict(zip(MODEL_INPUTS, (ids, mask, types), strict=True))
