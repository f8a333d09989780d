"""The process that runs one variant for `hasten.profiling`: commands and answers are lines of JSON.

Each variant has a process of its own, so that neither the thread pools nor the memory of one is counted for another.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from hasten.errors import HastenError
from hasten.runtime import Runtime, open_runtime
from hasten.variant import Variant, open_variant


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One command.

    Attributes:
        texts: The texts to classify, one at a time.
        warmup: How many of them to run first without counting.
    """

    texts: list[str]
    warmup: int = 0


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a command.

    Attributes:
        predictions: Label id by text.
        samples_ms: Milliseconds by text, tokenizer included.
        tokenizer_ms: Milliseconds by text, of the tokenizer alone.
        tokens: Length in tokens by text.
        peak_memory_bytes: Peak resident memory of the process so far.
        error: What went wrong; None if nothing did.
    """

    predictions: list[int] = []
    samples_ms: list[float] = []
    tokenizer_ms: list[float] = []
    tokens: list[int] = []
    peak_memory_bytes: int = 0
    error: str | None = None


def classify(runtime: Runtime, request: Request) -> Reply:
    """Classifies texts one at a time and times each from text to scores."""
    for text in request.texts[: request.warmup]:
        runtime.infer(runtime.encode([text]))
    predictions: list[int] = []
    totals: list[float] = []
    tokenizers: list[float] = []
    tokens: list[int] = []
    for text in request.texts:
        began = time.perf_counter()
        encodings = runtime.encode([text])
        encoded = time.perf_counter()
        logits = runtime.infer(encodings)
        ended = time.perf_counter()
        predictions.append(int(logits[0].argmax()))
        totals.append((ended - began) * 1e3)
        tokenizers.append((encoded - began) * 1e3)
        tokens.append(len(encodings[0]))
    return Reply(
        predictions=predictions, samples_ms=totals, tokenizer_ms=tokenizers, tokens=tokens,
        peak_memory_bytes=peak_memory_bytes(),
    )  # fmt: skip


def peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def work(folder: Path, threads: int, commands: BinaryIO, answers: BinaryIO) -> None:
    """Loads a variant, then answers commands until the input ends.

    Args:
        folder: The variant.
        threads: Threads to run with.
        commands: One `Request` a line.
        answers: One `Reply` a line, the first when the variant is loaded.
    """

    def answer(reply: Reply) -> None:
        answers.write(msgspec.json.encode(reply) + b"\n")
        answers.flush()

    try:
        variant: Variant = open_variant(folder)
        runtime = open_runtime(variant, threads=threads)
    except HastenError as error:
        answer(Reply(error=str(error)))
        return
    answer(Reply(peak_memory_bytes=peak_memory_bytes()))
    for line in commands:
        answer(classify(runtime, msgspec.json.decode(line, type=Request)))


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), sys.stdin.buffer, sys.stdout.buffer)
