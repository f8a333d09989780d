"""When it costs less to tokenize a text on the event loop than to hand it to a thread.

    python benchmarks/tokenize_hop.py VARIANT TEXTS [--repeats 300] [--name tokenize_hop]

The whole process has core 0. Texts of each length are made of those in TEXTS, one after the other; they are plain text,
and the same with a character that is not, which only the library tokenizes. Each is tokenized on the loop, and by a
thread that the loop awaits, in turn; what the thread adds is the difference of the medians.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import typer
import uvloop

from hasten.runtime import Runtime, open_runtime
from hasten.variant import open_variant
from hasten.workload import read_texts
from overload import SERVER_CORE
from provenance import save_result

NOT_PLAIN = "\u200d"  # a joiner of no width
CHARACTERS = (50, 100, 200, 300, 500, 1000, 2000)


async def compared(runtime: Runtime, text: str, repeats: int) -> dict[str, Any]:
    """Median microseconds on the loop and by a thread."""
    here_us, there_us = list[float](), list[float]()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            runtime.encode([text])
            here_us.append(1e6 * (time.perf_counter() - began))
            began = time.perf_counter()
            await loop.run_in_executor(pool, runtime.encode, [text])
            there_us.append(1e6 * (time.perf_counter() - began))
    here, there = statistics.median(here_us), statistics.median(there_us)
    return {
        "characters": len(text), "loop_us": round(here, 1), "thread_us": round(there, 1),
        "thread_adds_us": round(there - here, 1),
    }  # fmt: skip


def main(folder: Path, texts: str, repeats: int = 300, name: str = "tokenize_hop") -> None:
    """Measures each length, prints, saves."""
    os.sched_setaffinity(0, {SERVER_CORE})
    variant, long = open_variant(folder), " ".join(read_texts(texts))
    runtime = open_runtime(variant)
    rows: list[dict[str, Any]] = []
    for characters in CHARACTERS:
        for text, plain in ((long[:characters], True), (long[: characters - 1] + NOT_PLAIN, False)):
            rows.append({"plain": plain} | uvloop.run(compared(runtime, text, repeats)))
            print(rows[-1], flush=True)
    save_result(name, {"variant": variant.name, "repeats": repeats, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
