"""Batch invariance: whether a text gets the same logits alone and in any company.

Each text is run alone, in a random batch, and among mates that stretch a batch's activations: the longest text, a run
of tokens that the tokenizer does not know, a long repetition, and the text whose logits are largest. The made-up mates
are cut to the length of the longest text, except in the first batch, which is as long as they get. Nothing is longer
than `LONGEST_TOKENS` here: the memory that a batch takes grows with the square of its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.errors import DataError
from hasten.runtime import Logits, Runtime
from hasten.tokenization import Encoding

TOLERANCE = 1e-5
BATCH = 8
AMONG_MATES = 12
REPETITIONS, REPEATED_CHARACTERS = 512, 1000
LONGEST_TOKENS = 512
UNKNOWN = "\U0001f9ff\u16a0\u2603 " * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Invariance:
    """What company does to logits.

    Attributes:
        holds: No label flips, and no logit moves by more than `TOLERANCE`.
        label_flips: Answers that differ from the one given alone, over all batches.
        max_logit_difference: Largest move of a logit.
        texts: Texts that were compared.
    """

    holds: bool
    label_flips: int
    max_logit_difference: float
    texts: int


def batch_invariance(runtime: Runtime, texts: Sequence[str], *, seed: int = 0) -> Invariance:
    """Compares each text's logits alone with those in random batches and among adversarial mates.

    Args:
        runtime: What to run.
        texts: The texts, at least one.
        seed: Seed of the random batches.

    Returns:
        Flips and the largest difference.

    Raises:
        DataError: There are no texts.
    """
    if not texts:
        raise DataError("batch invariance is measured on texts; none were given")
    encodings = [_cut(encoding, LONGEST_TOKENS) for encoding in runtime.encode(texts)]
    alone = np.concatenate([runtime.infer([encoding]) for encoding in encodings])
    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    batches = [(order[at : at + BATCH], list[Encoding]()) for at in range(0, len(order), BATCH)]
    mates = _adversaries(runtime, texts, encodings, alone)
    longest = max(map(len, encodings))
    cut = [_cut(mate, longest) for mate in mates]
    for at in range(0, len(order), AMONG_MATES):
        batches.append((order[at : at + AMONG_MATES], cut if at else mates))
    flips, difference = 0, 0.0
    for rows, company in batches:
        found = runtime.infer([*(encodings[row] for row in rows), *company])[: len(rows)]
        flips += int((found.argmax(-1) != alone[rows].argmax(-1)).sum())
        difference = float(np.maximum(difference, np.abs(found - alone[rows]).max()))  # NaN stays
    return Invariance(
        holds=flips == 0 and difference <= TOLERANCE,
        label_flips=flips,
        max_logit_difference=difference,
        texts=len(texts),
    )


def _adversaries(
    runtime: Runtime, texts: Sequence[str], encodings: Sequence[Encoding], alone: Logits
) -> list[Encoding]:
    longest = max(encodings, key=len)
    largest = encodings[int(np.abs(alone).max(axis=-1).argmax())]
    made_up = runtime.encode([UNKNOWN, f"{texts[0][:REPEATED_CHARACTERS]} " * REPETITIONS])
    return [longest, largest, *(_cut(mate, LONGEST_TOKENS) for mate in made_up)]


def _cut(encoding: Encoding, tokens: int) -> Encoding:
    return Encoding(ids=encoding.ids[:tokens], type_ids=encoding.type_ids[:tokens])
