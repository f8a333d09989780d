"""Measuring rows: texts of an exact length, interleaved latencies, parity, accuracy, and answers in company."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hasten.errors import DataError
from hasten.intervals import mean, proportion
from hasten.invariance import batch_invariance
from hasten.profiling import ProfileOptions
from hasten.runtime import Logits, Runtime, open_runtime
from hasten.tokenization import TextEncoder
from hasten.variant import Variant
from hasten.workload import Workload, random_rows
from peers.client import Client
from peers.environments import Row

PARITY_TEXTS = 64
PARITY_BATCH = 8
FAITHFUL = 1e-3
COMPANY_TEXTS = 128
DISTINCT_TEXTS = 50
TURNS = 4
AS_THEY_COME = 0  # in place of a length

Samples = dict[str, list[float]]


def texts_of(source: Variant, texts: Sequence[str], tokens: int) -> list[str]:
    """Texts of exactly so many tokens, special ones included, cut from the given ones run together.

    Args:
        source: The classifier, for its tokenizer.
        texts: What to cut from.
        tokens: Length in tokens.

    Returns:
        At most `DISTINCT_TEXTS`.

    Raises:
        DataError: There is not one.
    """
    encode = TextEncoder(source)
    words = " ".join(texts[row] for row in random_rows(len(texts), len(texts), seed=0)).split()
    found: list[str] = []
    start = 0
    while start < len(words) and len(found) < DISTINCT_TEXTS:
        stop = start + 1
        while stop < len(words) and len(encode([" ".join(words[start : stop + 1])])[0]) <= tokens:
            stop += 1
        text = " ".join(words[start:stop])
        if len(encode([text])[0]) == tokens:
            found.append(text)
        start = stop
    if not found:
        raise DataError(f"the test texts give none of {tokens} tokens; give more or longer ones")
    return found


def latencies(
    rows: Sequence[Row], source: Variant, texts: dict[int, list[str]], options: ProfileOptions, launch: int
) -> dict[int, Samples]:
    """Milliseconds a text, by length and row, of one launch: all rows' processes started anew.

    The requests of a length are asked in turns, in each of which the rows have a random order, with a pause before
    each: the machine changes its speed within a launch, and then changes it for all. Texts as they come are all asked
    once before: a server meets the same lengths again and again, and some runtimes prepare for each.
    """
    generator = np.random.default_rng((options.seed, launch))
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(row, source, options.resolved_threads)) for row in rows]
        samples: dict[int, Samples] = {tokens: {row.name: [] for row in rows} for tokens in texts}
        for tokens, asked in texts.items():
            for turn, part in enumerate(np.array_split(asked, TURNS)):
                for at in generator.permutation(len(clients)):
                    time.sleep(options.settle_s)
                    client = clients[at]
                    if tokens == AS_THEY_COME and turn == 0:
                        client.classify(asked)
                    found = client.classify([str(text) for text in part], warmup=options.warmup)["samples_ms"]
                    samples[tokens][client.row.name] += found
    return samples


def p50(launches: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """The mean of the launches' medians with Student's interval, in ms."""
    return rounded(asdict(mean(np.asarray([np.median(samples) for samples in launches]))))


def times_faster(
    ours: str, peers: Sequence[str], samples: dict[str, list[list[float]]]
) -> dict[str, dict[str, float | None]]:
    """By peer: its median over ours, the geometric mean of the launches with its interval; above 1 we are faster.

    The same graph started twice differs by several per cent, more than requests to one process do: launches are what
    is repeated and counted. Source: Kalibera and Jones 2013, "Rigorous benchmarking in reasonable time".
    """
    found: dict[str, dict[str, float | None]] = {}
    for peer in peers:
        pairs = zip(samples[peer], samples[ours], strict=True)
        logs = mean(np.asarray([np.log(np.median(theirs) / np.median(mine)) for theirs, mine in pairs]))
        ends = {key: None if value is None else float(np.exp(value)) for key, value in asdict(logs).items()}
        found[peer] = rounded(ends)
    return found


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Three decimals."""
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}


def on_padded_batches(runtime: Runtime, texts: Sequence[str]) -> Logits:
    """Logits of the first texts in batches of rows of different lengths; shape [texts, labels]."""
    encodings = runtime.encode(texts[:PARITY_TEXTS])
    starts = range(0, len(encodings), PARITY_BATCH)
    return np.concatenate([runtime.infer(encodings[at : at + PARITY_BATCH]) for at in starts])


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What PyTorch answers.

    Attributes:
        padded: Logits on padded batches of the first test texts; shape [texts, labels].
        answers: Label id by test text.
    """

    padded: list[list[float]]
    answers: list[int]


def reference(source: Variant, test: Workload, threads: int) -> Reference:
    """PyTorch's answers, which parity is judged by."""
    runtime = open_runtime(source, threads=threads)
    answers = [int(runtime.infer(runtime.encode([text]))[0].argmax()) for text in test.texts]
    return Reference(padded=on_padded_batches(runtime, test.texts).tolist(), answers=answers)


def accuracy(answers: Sequence[int], test: Workload) -> dict[str, float | None]:
    """Share of right answers with its interval."""
    right = int((np.asarray(answers) == np.asarray(test.labels)).sum())
    interval = asdict(proportion(right, len(test)))
    return {key: None if value is None else round(value, 5) for key, value in interval.items()}


def quality(row: Row, source: Variant, test: Workload, expected: Reference, threads: int) -> dict[str, Any]:
    """Parity with PyTorch, accuracy on single texts, and whether company changes answers."""
    with Client(row, source, threads) as client:
        moved = float(np.abs(on_padded_batches(client, test.texts) - np.asarray(expected.padded)).max())
        answers = np.asarray(client.classify(test.texts)["logits"]).argmax(-1)
        company = batch_invariance(client, test.texts[:COMPANY_TEXTS])
        return {
            "runtime": client.versions,
            "max_logit_difference_from_pytorch": moved,
            "faithful": moved <= FAITHFUL if row.precision == "fp32" else None,
            "answers_other_than_pytorch": int((answers != np.asarray(expected.answers)).sum()),
            "accuracy": accuracy(answers.tolist(), test),
            "company": asdict(company),
        }
