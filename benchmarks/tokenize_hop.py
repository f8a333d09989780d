"""When it costs less to tokenize a text on the event loop than to hand it to a thread.

    python benchmarks/tokenize_hop.py VARIANT TEXTS [--repeats 300] [--name tokenize_hop]

The whole process has core 0. Texts of each length are made of those in TEXTS, one after the other. Each is tokenized on
the loop, and by a thread that the loop awaits, in turn; what the thread adds is the difference of the medians.
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
        rows.append(uvloop.run(compared(runtime, long[:characters], repeats)))
        print(rows[-1], flush=True)
    save_result(name, {"variant": variant.name, "repeats": repeats, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
