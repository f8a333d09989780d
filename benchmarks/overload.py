"""What is left of a server's answers when far more is asked than it can give.

    python benchmarks/overload.py VARIANT TEXTS [--p99-ms 50] [--seconds 8] [--rounds 3] [--name overload]

The server has core 0 and one thread, the load generator core 1, so what the generator needs is not taken from the
server. The capacity is what the bare runtime reaches on core 0 in a loop, tokenizer included, without HTTP, before and
after each load, since the machine's own speed comes and goes. Offered are shares and multiples of what it was at first,
each as an open-loop Poisson load of its own, in random order; figures are medians over rounds.

At a low rate a runtime is slower than in a loop, since caches and clocks are not where the last text left them, so the
server's latency is also set beside that of the bare runtime asked at the same random moments. What the generator adds
is its own latency against a server on core 0 that does nothing.
"""

from __future__ import annotations

import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from hasten.load import Load, LoadOptions, asked_rows, due_times, offer
from hasten.runtime import open_runtime
from hasten.variant import Variant, open_variant
from hasten.workload import read_texts
from provenance import save_result

LOW = 0.05
SHARES = (LOW, 0.2, 0.5, 0.8, 1.0, 2.0, 5.0, 10.0)
SERVER_CORE, LOAD_CORE = 0, 1
BARE_S, BETWEEN_S = 5.0, 1.5


class Bare:
    """The runtime alone, with one thread, tokenizer included.

    Args:
        variant: Whose.
        texts: What it is asked.
    """

    def __init__(self, variant: Variant, texts: list[str]) -> None:
        self._runtime, self._texts = open_runtime(variant, threads=1), texts
        for text in texts[:50]:
            self._seconds(text)

    def _seconds(self, text: str) -> float:
        began = time.perf_counter()
        self._runtime.infer(self._runtime.encode([text]))
        return time.perf_counter() - began

    def in_a_loop(self, seconds: float) -> list[float]:
        """Seconds of each text, for so long."""
        taken_s = list[float]()
        while sum(taken_s) < seconds:
            taken_s.append(self._seconds(self._texts[len(taken_s) % len(self._texts)]))
        return taken_s

    def rate(self, seconds: float = BETWEEN_S) -> float:
        """Texts a second in a loop, on the server's core, whatever this process's is."""
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {SERVER_CORE})
        taken_s = self.in_a_loop(seconds)
        os.sched_setaffinity(0, cores)
        return len(taken_s) / sum(taken_s)

    def when_due(self, options: LoadOptions) -> list[float]:
        """Seconds of each text that is due at a random moment, waiting for the one before left out."""
        due_s, taken_s = due_times(options), list[float]()
        rows = asked_rows(options, len(self._texts), len(due_s))
        began = time.perf_counter()
        for due, text in zip(due_s, (self._texts[row] for row in rows), strict=True):
            time.sleep(max(0.0, began + due - time.perf_counter()))
            taken_s.append(self._seconds(text))
        return taken_s


def bare_seconds(variant: Variant, texts: list[str]) -> list[float]:
    """Seconds of each text in a loop."""
    return Bare(variant, texts).in_a_loop(BARE_S)


def started(folder: Path, p99_ms: float | None, *flags: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server on this process's core, when it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    limit = [] if p99_ms is None else ["--p99-ms", str(p99_ms)]
    command = [sys.executable, "-m", "hasten", "serve", str(folder), "--port", str(port), *limit, *flags]
    server = subprocess.Popen([*command, "--threads", "1", "--workers", "1"], stderr=subprocess.DEVNULL)
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server, f"http://127.0.0.1:{port}"
        time.sleep(0.1)
    raise SystemExit("the server did not start")


def row_of(load: Load, capacity: float) -> dict[str, Any]:
    """One load in figures."""
    refused = float(np.percentile(load.refused_ms, 99)) if load.refused_ms else None
    late = sum(latency > load.p99_ms for latency in load.latencies_ms)
    return {
        "share": round(load.rate / capacity, 2), "rate": round(load.rate, 1), "offered": load.offered,
        "answered": len(load.latencies_ms), "late": late, "refused": len(load.refused_ms), "errors": load.errors,
        "goodput": round(load.goodput, 1), "goodput_share": round(load.goodput / capacity, 3),
        "p50_ms": round(load.percentile(50).value, 2), "p99_ms": round(load.percentile(99).value, 2),
        "refused_p99_ms": None if refused is None else round(refused, 2),
        "send_delay_p99_ms": round(float(np.percentile(load.send_delays_ms, 99)), 2),
    }  # fmt: skip


def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one share over rounds; errors are added up."""
    names = [name for name in rows[0] if name != "errors"]
    found = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    errors = sum((Counter(row["errors"]) for row in rows), Counter[int]())
    return {
        name: round(statistics.median(values), 3) if values else None for name, values in found.items()
    } | {"errors": dict(errors)}  # fmt: skip


def low_load(bare: Bare, options: LoadOptions) -> dict[str, float]:
    """Medians in milliseconds where little is asked: the bare runtime on the server's core, and the generator."""
    os.sched_setaffinity(0, {SERVER_CORE})
    paced, looped = bare.when_due(options), bare.in_a_loop(BETWEEN_S)
    with subprocess.Popen([sys.executable, "-m", "hasten.null_server"], stdout=subprocess.PIPE, text=True) as server:
        os.sched_setaffinity(0, {LOAD_CORE})
        try:
            address = f"http://127.0.0.1:{server.stdout.readline().strip() if server.stdout else ''}"
            generator_ms = offer(address, ["nothing"], options).percentile(50).value
        finally:
            server.terminate()
    return {
        "bare_when_due_p50_ms": round(1e3 * statistics.median(paced), 3),
        "bare_in_a_loop_p50_ms": round(1e3 * statistics.median(looped), 3),
        "generator_p50_ms": round(generator_ms, 3),
    }


def main(
    folder: Path, texts: str, p99_ms: Annotated[float, typer.Option()] = 50.0, seconds: float = 8.0, rounds: int = 3,
    name: str = "overload",
) -> None:  # fmt: skip
    """Measures the capacity, offers each share of it, prints, saves."""
    variant, asked = open_variant(folder), read_texts(texts)
    bare = Bare(variant, asked)
    capacity = bare.rate(BARE_S)
    print(f"bare: {capacity:.1f} texts/s", flush=True)
    os.sched_setaffinity(0, {SERVER_CORE})
    server, url = started(folder, p99_ms)
    os.sched_setaffinity(0, {LOAD_CORE})
    found: dict[float, list[dict[str, Any]]] = {share: [] for share in SHARES}
    low = list[dict[str, float]]()
    try:
        offer(url, asked, LoadOptions(rate=capacity / 2, seconds=2, p99_ms=p99_ms))  # warms both up
        for number in range(rounds):
            low.append(low_load(bare, LoadOptions(rate=LOW * capacity, seconds=seconds, p99_ms=p99_ms, seed=number)))
            print(number, low[-1], flush=True)
            for share in random.Random(number).sample(SHARES, len(SHARES)):
                options = LoadOptions(rate=share * capacity, seconds=seconds, p99_ms=p99_ms, seed=number)
                before, load = bare.rate(), offer(url, asked, options)
                own = (before + bare.rate()) / 2
                found[share].append(row_of(load, own) | {"share": share, "bare_texts_per_s": round(own, 1)})
                print(number, found[share][-1], flush=True)
    finally:
        server.terminate()
        server.wait()
    save_result(name, {
        "variant": variant.name, "architecture": variant.manifest.architecture,
        "parameters": variant.manifest.parameters.total, "p99_ms": p99_ms, "seconds": seconds, "rounds": rounds,
        "bare_texts_per_s": round(capacity, 1),
        "low_load": {what: round(statistics.median(one[what] for one in low), 3) for what in low[0]},
        "rows": [middle(rows) for rows in found.values()], "loads": found,
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
