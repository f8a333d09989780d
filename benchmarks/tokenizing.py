"""What tokenizing takes by `tokenizers` and with the short way for plain text, and whether the ids are the same.

    python benchmarks/tokenizing.py VARIANT TEXTS [--rounds 10] [--name tokenizing]

Texts are tokenized one by one on one core, by both ways in turns of one pass over all: in a loop that does nothing
else, and each followed by its inference, as in a request, which leaves the caches to the model. VARIANT is an ONNX
variant with BERT's WordPiece. Nothing else may run beside it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from hasten.runtime import open_runtime
from hasten.tokenization import Encoding, TextEncoder
from hasten.variant import open_variant
from hasten.workload import read_texts
from overload import SERVER_CORE
from provenance import save_result

Encode = Callable[[list[str]], list[Encoding]]
Infer = Callable[[list[Encoding]], Any]


def without_short_way(folder: Path) -> TextEncoder:
    """The same encoder, by `tokenizers` alone."""
    encoder = TextEncoder(open_variant(folder))
    encoder._plain = None  # pyright: ignore[reportPrivateUsage]
    return encoder


def one_pass(encode: Encode, infer: Infer, texts: list[str]) -> tuple[list[float], list[float]]:
    """Microseconds of each text: to tokenize it, and to classify it with that."""
    tokenizing, whole = list[float](), list[float]()
    for text in texts:
        began = time.perf_counter()
        encoded = encode([text])
        tokenizing.append(1e6 * (time.perf_counter() - began))
        infer(encoded)
        whole.append(1e6 * (time.perf_counter() - began))
    return tokenizing, whole


def main(folder: Path, texts: str, rounds: int = 10, name: str = "tokenizing") -> None:
    """Measures both ways, prints, saves."""
    os.sched_setaffinity(0, {SERVER_CORE})
    asked, runtime = read_texts(texts), open_runtime(open_variant(folder))
    short, library = TextEncoder(open_variant(folder)), without_short_way(folder)
    ways: dict[str, Encode] = {"tokenizers": library, "hasten": short}
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for way, encode in ways.items():
            alone, _ = one_pass(encode, lambda _: None, asked)
            between, whole = one_pass(encode, runtime.infer, asked)
            for what, samples in (("alone", alone), ("between_inferences", between), ("request", whole)):
                found.setdefault(f"{way}_{what}_us", []).extend(samples)
    medians = {what: round(statistics.median(samples), 1) for what, samples in found.items()}
    result: dict[str, object] = {
        "variant": open_variant(folder).name, "texts": len(asked), "rounds": rounds,
        "short_way": sum(short._plain is not None and short._plain(text) is not None for text in asked),  # pyright: ignore[reportPrivateUsage]
        "differ": sum(ours != theirs for ours, theirs in zip(short(asked), library(asked), strict=True)),
        "median": medians,
    }  # fmt: skip
    print(result)
    save_result(name, result)


if __name__ == "__main__":
    typer.run(main)
