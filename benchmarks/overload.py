"""What is left of a server's answers when far more is asked than it can give.

    python benchmarks/overload.py VARIANT TEXTS [--p99-ms 50] [--seconds 8] [--name overload]

The server has core 0 and one thread, the load generator core 1, so what the generator needs is not taken from the
server. The capacity is what the bare runtime reaches on core 0 in a loop, tokenizer included, without HTTP. Offered are
shares and multiples of it, each as an open-loop Poisson load of its own, in random order.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from hasten.load import Load, LoadOptions, offer
from hasten.runtime import open_runtime
from hasten.variant import Variant, open_variant
from hasten.workload import read_texts
from provenance import save_result

SHARES = (0.2, 0.5, 0.8, 1.0, 2.0, 5.0, 10.0)
SERVER_CORE, LOAD_CORE = 0, 1
BARE_S = 5.0


def bare_seconds(variant: Variant, texts: list[str]) -> list[float]:
    """Seconds of each text in a loop, tokenizer included."""
    runtime, taken_s = open_runtime(variant, threads=1), list[float]()
    for text in texts[:50]:
        runtime.infer(runtime.encode([text]))
    while sum(taken_s) < BARE_S:
        began = time.perf_counter()
        runtime.infer(runtime.encode([texts[len(taken_s) % len(texts)]]))
        taken_s.append(time.perf_counter() - began)
    return taken_s


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


def main(
    folder: Path, texts: str, p99_ms: Annotated[float, typer.Option()] = 50.0, seconds: float = 8.0,
    name: str = "overload",
) -> None:  # fmt: skip
    """Measures the capacity, offers each share of it, prints, saves."""
    os.sched_setaffinity(0, {SERVER_CORE})
    variant, asked = open_variant(folder), read_texts(texts)
    taken_s = bare_seconds(variant, asked)
    capacity = len(taken_s) / sum(taken_s)
    print(f"bare: {capacity:.1f} texts/s", flush=True)
    server, url = started(folder, p99_ms)
    os.sched_setaffinity(0, {LOAD_CORE})
    rows: list[dict[str, Any]] = []
    try:
        offer(url, asked, LoadOptions(rate=capacity / 2, seconds=2, p99_ms=p99_ms))  # warms both up
        for share in random.Random(0).sample(SHARES, len(SHARES)):
            load = offer(url, asked, LoadOptions(rate=share * capacity, seconds=seconds, p99_ms=p99_ms, seed=1))
            rows.append(row_of(load, capacity))
            print(rows[-1], flush=True)
    finally:
        server.terminate()
        server.wait()
    parameters = variant.manifest.parameters.total
    save_result(name, {
        "variant": variant.name, "architecture": variant.manifest.architecture, "parameters": parameters,
        "p99_ms": p99_ms, "seconds": seconds, "bare_texts_per_s": round(capacity, 1),
        "rows": sorted(rows, key=lambda row: row["share"]),
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
