"""The process that runs one variant for `hasten.profiling`: commands and answers are lines of JSON.

Each variant has a process of its own, so that neither the thread pools nor the memory of one is counted for another.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import msgspec

from hasten.errors import HastenError
from hasten.runtime import Runtime, open_runtime, softmax
from hasten.variant import Variant, open_variant

CONFIDENCE_DIGITS = 6


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One command.

    Attributes:
        texts: The texts to classify, one at a time.
        warmup: How many of them to run first without counting.
        clients: How many ask at the same time; the texts are shared out among them.
    """

    texts: list[str]
    warmup: int = 0
    clients: int = 1


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a command.

    Attributes:
        predictions: Label id by text.
        confidences: Probability of that label by text.
        samples_ms: Milliseconds by text, tokenizer included.
        tokenizer_ms: Milliseconds by text, of the tokenizer alone.
        tokens: Length in tokens by text.
        elapsed_s: From the first text to the last answer.
        peak_memory_bytes: Peak resident memory of the process so far.
        error: What went wrong; None if nothing did.
    """

    predictions: list[int] = []
    confidences: list[float] = []
    samples_ms: list[float] = []
    tokenizer_ms: list[float] = []
    tokens: list[int] = []
    elapsed_s: float = 0.0
    peak_memory_bytes: int = 0
    error: str | None = None


def classify(runtime: Runtime, request: Request, met: set[int]) -> Reply:
    """Classifies texts and times each from text to scores; each client sends one at a time.

    Args:
        runtime: What to run; with several clients it is called from as many threads.
        request: The texts and the clients.
        met: Lengths in tokens that the calling thread has run; grows.

    Returns:
        Answers and timings; those of several clients one client after another.
    """
    bounds = [len(request.texts) * client // request.clients for client in range(request.clients + 1)]
    shares = [request.texts[start:end] for start, end in pairwise(bounds)]
    began = list[float]()
    ready = threading.Barrier(request.clients, action=lambda: began.append(time.perf_counter()))

    def client(texts: Sequence[str]) -> Reply:
        try:
            warm_up(runtime, texts, request.warmup, met if request.clients == 1 else set())
            ready.wait()
        except threading.BrokenBarrierError:
            return Reply()  # another failed, and tells why
        except BaseException:
            ready.abort()
            raise
        return _one_client(runtime, texts)

    if request.clients == 1:
        replies = [client(shares[0])]
    else:
        with ThreadPoolExecutor(request.clients) as pool:
            replies = list(pool.map(client, shares))
    elapsed_s = time.perf_counter() - began[0]
    return Reply(
        predictions=[p for r in replies for p in r.predictions],
        confidences=[c for r in replies for c in r.confidences],
        samples_ms=[s for r in replies for s in r.samples_ms],
        tokenizer_ms=[t for r in replies for t in r.tokenizer_ms], tokens=[n for r in replies for n in r.tokens],
        elapsed_s=elapsed_s, peak_memory_bytes=peak_memory_bytes(),
    )  # fmt: skip


def warm_up(runtime: Runtime, texts: Sequence[str], warmup: int, met: set[int]) -> None:
    """Runs a text of each length for a runtime that compiles each, as a server does at its start, then the first texts.

    In the calling thread, for which a runtime may keep what it compiled, or a session.

    Args:
        runtime: What to run.
        texts: Texts that are about to be timed.
        warmup: How many of them to run in any case.
        met: Lengths in tokens that this thread has run; grows.
    """
    for encoding in runtime.encode(texts) if runtime.compiles_shapes else ():
        if len(encoding) not in met:
            runtime.infer([encoding])
            met.add(len(encoding))
    for text in texts[:warmup]:
        runtime.infer(runtime.encode([text]))


def _one_client(runtime: Runtime, texts: Sequence[str]) -> Reply:
    predictions: list[int] = []
    confidences: list[float] = []
    totals: list[float] = []
    tokenizers: list[float] = []
    tokens: list[int] = []
    for text in texts:
        began = time.perf_counter()
        encodings = runtime.encode([text])
        encoded = time.perf_counter()
        logits = runtime.infer(encodings)
        ended = time.perf_counter()
        predictions.append(int(logits[0].argmax()))
        confidences.append(round(float(softmax(logits)[0].max()), CONFIDENCE_DIGITS))
        totals.append((ended - began) * 1e3)
        tokenizers.append((encoded - began) * 1e3)
        tokens.append(len(encodings[0]))
    return Reply(
        predictions=predictions, confidences=confidences, samples_ms=totals, tokenizer_ms=tokenizers, tokens=tokens
    )


def peak_memory_bytes() -> int:
    """Peak resident memory of this process.

    On Linux from `/proc`, since `getrusage` counts the process that started this one too, see proc(5) on `VmHWM`.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * next(
            int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")
        )
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def work(folder: Path, threads: int, workers: int, commands: BinaryIO, answers: BinaryIO) -> None:
    """Loads a variant, then answers commands until the input ends.

    Args:
        folder: The variant.
        threads: Threads of one inference.
        workers: Inferences at the same time.
        commands: One `Request` a line.
        answers: One `Reply` a line, the first when the variant is loaded.
    """

    def answer(reply: Reply) -> None:
        answers.write(msgspec.json.encode(reply) + b"\n")
        answers.flush()

    try:
        variant: Variant = open_variant(folder)
        runtime = open_runtime(variant, threads=threads, workers=workers)
    except HastenError as error:
        answer(Reply(error=str(error)))
        return
    answer(Reply(peak_memory_bytes=peak_memory_bytes()))
    met = set[int]()
    for line in commands:
        answer(classify(runtime, msgspec.json.decode(line, type=Request), met))


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.stdin.buffer, sys.stdout.buffer)
