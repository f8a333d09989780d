"""The transfer set: more texts for a teacher to answer, the user's own unlabelled ones and made from training texts.

Three ways to make a new text from training texts, none of which needs anything from outside. The teacher answers
whatever comes out, so a way need not keep the label.

- *replace*: each word gives way, with a given chance, to one of its nearest neighbours in the teacher's own table of
  token embeddings. Source: Jiao et al. 2020, "TinyBERT: distilling BERT for natural language understanding",
  algorithm 1. We differ in that the neighbours come from the teacher's fine-tuned embeddings, by cosine, where they
  take GloVe's or a masked language model's, and in that only words that are one token are replaced.
- *recombine*: the beginning of one text before the end of another, cut at random words.
- *truncate*: a run of words from a text.

What equals, or nearly equals, a guarded text (validation and test rows) is left out and counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import MissingExtraError, UsageError
from hasten.torch_runtime import load_torch_model
from hasten.variant import Variant
from hasten.workload import normalised, some_rows

BLOCK_TEXTS = 2000
BLOCK_WORDS = 1000
TIMED_TEXTS = 200
MOST_ATTEMPTS = 4  # for each text wanted; short training texts soon give nothing new
LEAST_WORDS = 3
SPACED_SHARE = 0.1
Neighbours = Mapping[str, Sequence[str]]
Words = list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOptions:
    """How to widen the training texts.

    Attributes:
        augment: New texts for each training text, at least 0.
        replace_share: Chance of each word to be replaced, 0 to 1.
        neighbours: How many of a word's nearest neighbours may take its place, at least 1.
        nearly_equal: Similarity above which a text counts as a guarded one, 0 to 1: twice the letters that two texts
            have in common, in order, over the letters of both.
        seed: Seed of every draw.
    """

    augment: float = 0.0
    replace_share: float = 0.4
    neighbours: int = 15
    nearly_equal: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UsageError: A value is out of range.
        """
        if not 0 <= self.augment < 1000:
            raise UsageError(f"new texts for each training text: a number from 0 below 1000, not {self.augment}")
        if not (0 <= self.replace_share <= 1 and 0 < self.nearly_equal <= 1):
            raise UsageError(
                f"shares are 0 to 1, not {self.replace_share} (replacing), {self.nearly_equal} (nearly equal)"
            )
        if self.neighbours < 1:
            raise UsageError(f"at least 1 neighbour is needed, not {self.neighbours}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSet:
    """Texts without labels, for a teacher to answer.

    Attributes:
        texts: The texts; none stands twice, nor in the training data.
        counts: How many came from where (`unlabelled`, `replace`, `recombine`, `truncate`), and how many were left out
            as doubles (`duplicates`) or for standing too near a guarded text (`guarded`).
    """

    texts: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict[str, int])


def widened(
    teacher: Variant, train: Sequence[str], unlabelled: Sequence[str], guarded: Sequence[str], options: TransferOptions
) -> TransferSet:
    """A transfer set whose words give way to neighbours in a teacher's own table of embeddings.

    Args:
        teacher: A torch variant.
        train: The training texts.
        unlabelled: The user's further texts.
        guarded: Texts that no text of the transfer set may equal or nearly equal.
        options: How many, and how.

    Returns:
        As `make_transfer_set`.
    """
    neighbours = neighbours_in(teacher, train, options.neighbours) if options.augment else {}
    return make_transfer_set(train, unlabelled, guarded, neighbours, options)


def make_transfer_set(
    train: Sequence[str], unlabelled: Sequence[str], guarded: Sequence[str], neighbours: Neighbours,
    options: TransferOptions,
) -> TransferSet:  # fmt: skip
    """Makes a transfer set.

    Args:
        train: The training texts; at least one.
        unlabelled: The user's further texts.
        guarded: Texts that no text of the transfer set may equal or nearly equal.
        neighbours: Words that may take a word's place, see `nearest_neighbours`; empty replaces nothing.
        options: How many, and how.

    Returns:
        The unlabelled texts, then the new ones, in the order they were made.
    """
    seen = {normalised(text) for text in train}
    found: dict[str, str] = {}
    counts = {"unlabelled": 0, "duplicates": 0}
    for text in unlabelled:
        counts["duplicates"] += not _add(text, "unlabelled", found, seen)
    _widen(train, neighbours, options, found, seen)
    near = nearly_equal_rows(list(found), guarded, options.nearly_equal)
    kept = {text: way for row, (text, way) in enumerate(found.items()) if row not in near}
    for way in kept.values():
        counts[way] = counts.get(way, 0) + 1
    return TransferSet(texts=tuple(kept), counts=counts | {"guarded": len(near)})


def _add(text: str, way: str, found: dict[str, str], seen: set[str]) -> bool:
    key = normalised(text)
    if not key or key in seen:
        return False
    seen.add(key)
    found[text] = way
    return True


def _widen(
    train: Sequence[str], neighbours: Neighbours, options: TransferOptions, found: dict[str, str], seen: set[str]
) -> None:
    """Adds new texts until there are enough, or the training texts give no more."""
    wanted = len(found) + round(options.augment * len(train))
    ways = {"replace": _replaced, "recombine": _recombined, "truncate": _truncated}
    if not neighbours:
        ways.pop("replace")
    words = [text.split() for text in train]
    names = list(ways)
    for attempt in range(MOST_ATTEMPTS * (wanted - len(found))):
        if len(found) >= wanted:
            return
        generator = np.random.default_rng((options.seed, attempt))
        way = names[attempt % len(names)]
        make: Callable[..., Words] = ways[way]
        _add(" ".join(make(words, attempt // len(names), neighbours, options, generator)), way, found, seen)


def _source(words: Sequence[Words], turn: int, seed: int) -> Words:
    """The training text whose turn it is: all of them once, then all again."""
    lap, place = divmod(turn, len(words))
    step = np.random.default_rng((seed, lap)).integers(len(words))
    return words[(place + int(step)) % len(words)]


def _replaced(
    words: Sequence[Words], turn: int, neighbours: Neighbours, options: TransferOptions, generator: np.random.Generator
) -> Words:
    source = _source(words, turn, options.seed)
    chances = generator.random(len(source))
    return [
        str(generator.choice(neighbours[word.casefold()]))
        if chance < options.replace_share and neighbours.get(word.casefold())
        else word
        for word, chance in zip(source, chances, strict=True)
    ]


def _recombined(
    words: Sequence[Words], turn: int, _neighbours: Neighbours, options: TransferOptions, generator: np.random.Generator
) -> Words:
    start, end = _source(words, turn, options.seed), words[int(generator.integers(len(words)))]
    return start[: int(generator.integers(len(start) + 1))] + end[int(generator.integers(len(end) + 1)) :]


def _truncated(
    words: Sequence[Words], turn: int, _neighbours: Neighbours, options: TransferOptions, generator: np.random.Generator
) -> Words:
    source = _source(words, turn, options.seed)
    size = int(generator.integers(min(LEAST_WORDS, len(source)), len(source) + 1))
    start = int(generator.integers(len(source) - size + 1))
    return source[start : start + size]


def neighbours_in(teacher: Variant, texts: Sequence[str], size: int) -> dict[str, list[str]]:
    """The words nearest to those of some texts in a teacher's table of token embeddings.

    Args:
        teacher: A torch variant.
        texts: The texts.
        size: How many neighbours a word gets.

    Returns:
        As `nearest_neighbours`.
    """
    from tokenizers import Tokenizer

    embeddings = load_torch_model(teacher).get_input_embeddings().weight.detach().numpy()
    tokenizer = Tokenizer.from_file(str(teacher.path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return nearest_neighbours({word for text in texts for word in text.split()}, tokenizer, embeddings, size)


def nearest_neighbours(
    words: Iterable[str], tokenizer: Any, embeddings: NDArray[np.float32], size: int
) -> dict[str, list[str]]:
    """The words nearest to each word in a table of token embeddings, by cosine.

    Args:
        words: The words to find neighbours of; those that are not one token in the tokenizer have none.
        tokenizer: A `tokenizers.Tokenizer`.
        embeddings: One row a token; shape [tokens, hidden].
        size: How many neighbours a word gets.

    Returns:
        Neighbours, the nearest first, by case-folded word.
    """
    tokens = _whole_words(tokenizer)
    names, ids = list(tokens), np.fromiter(tokens.values(), dtype=np.int64, count=len(tokens))
    rows = embeddings[ids]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    places = {name: place for place, name in enumerate(names)}
    asked = [word for word in sorted({word.casefold() for word in words}) if word in places]
    found: dict[str, list[str]] = {}
    for start in range(0, len(asked), BLOCK_WORDS):
        block = asked[start : start + BLOCK_WORDS]
        near = rows[[places[word] for word in block]] @ rows.T
        order = np.argsort(-near, axis=1, kind="stable")[:, : size + 1]
        for word, places_of in zip(block, order, strict=True):
            found[word] = [names[int(place)] for place in places_of if names[int(place)] != word][:size]
    return found


def _whole_words(tokenizer: Any) -> dict[str, int]:
    """Words that are one token, with its id: what marks a word's begin differs between tokenizers, so each is asked.

    Where many tokens hold the space before a word, as in byte-level vocabularies, those without it are parts of words.
    """
    ids = range(tokenizer.get_vocab_size())
    spelt = tokenizer.decode_batch([[token] for token in ids])
    spaced = sum(text.startswith(" ") and text.strip().isalpha() for text in spelt)
    space = " " if spaced > SPACED_SHARE * len(spelt) else ""
    names = [text.removeprefix(space).strip() for text in spelt]
    alone = tokenizer.encode_batch([space + name for name in names], add_special_tokens=False)
    return {
        name: token
        for token, text, name, encoded in zip(ids, spelt, names, alone, strict=True)
        if text.startswith(space) and name.isalpha() and name == name.casefold() and encoded.ids == [token]
    }


def guarding_seconds(texts: Sequence[str], guarded: Sequence[str], similarity: float) -> float:
    """Seconds a text that `nearly_equal_rows` takes here, which grows with the number of guarded ones.

    Args:
        texts: Texts like those to come, at least one; a few hundred of them are taken.
        guarded: As of `nearly_equal_rows`, as are the errors.
        similarity: The same.

    Returns:
        Seconds.
    """
    if not guarded:
        return 0.0
    some = [texts[row] for row in some_rows(len(texts), TIMED_TEXTS, seed=0)]
    began = time.perf_counter()
    nearly_equal_rows(some, guarded, similarity)
    return (time.perf_counter() - began) / len(some)


def nearly_equal_rows(texts: Sequence[str], guarded: Sequence[str], similarity: float) -> set[int]:
    """Which texts equal or nearly equal a guarded one.

    Args:
        texts: The texts to look at.
        guarded: The texts to stay away from.
        similarity: As `TransferOptions.nearly_equal`, of the texts without case and spacing.

    Returns:
        Rows of `texts`.

    Raises:
        MissingExtraError: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz import fuzz, process
    except ImportError as error:
        raise MissingExtraError("rapidfuzz", "optimize") from error
    others = [normalised(text) for text in guarded]
    found: set[int] = set()
    for start in range(0, len(texts), BLOCK_TEXTS):
        block = [normalised(text) for text in texts[start : start + BLOCK_TEXTS]]
        scores = process.cdist(
            block, others, scorer=fuzz.ratio, score_cutoff=100 * similarity, dtype=np.uint8, workers=-1
        )  # fmt: skip
        found |= {start + int(row) for row in np.flatnonzero(scores.any(axis=1))}
    return found
