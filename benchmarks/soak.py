"""Whether a server stays as it was: memory, file descriptors, threads and latency over a long load.

    python benchmarks/soak.py VARIANT TEXTS [--minutes 20] [--rate 200] [--p99-ms 50] [--name soak]

The server has core 0 and one thread, the generator core 1. Offered is an open-loop Poisson load, in loads of a minute.
The server's resident memory, file descriptors and threads are read every ten seconds. What grows is told by the slope
of Theil and Sen over the second half, with its 95 % interval: in the first, buffers and caches fill.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from scipy.stats import theilslopes

from hasten.load import LoadOptions, offer
from hasten.variant import open_variant
from hasten.workload import read_texts
from overload import LOAD_CORE, SERVER_CORE, started
from provenance import save_result

EVERY_S, LOAD_S = 10.0, 60.0


@dataclass(frozen=True, slots=True)
class Watch:
    """What a process takes, read now and then by a thread.

    Attributes:
        process: The process.
        rows: What was read.
        ended: Ends the reading.
    """

    process: psutil.Process
    rows: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Reads until it is ended."""
        begun_s = time.monotonic()
        while not self.ended.wait(EVERY_S):
            with self.process.oneshot():
                self.rows.append({
                    "s": round(time.monotonic() - begun_s, 1),
                    "rss_mb": round(self.process.memory_info().rss / 2**20, 2),
                    "file_descriptors": self.process.num_fds(), "threads": self.process.num_threads(),
                })  # fmt: skip


def growth(rows: list[dict[str, float]], what: str) -> dict[str, float]:
    """First and last of a figure, its highest, and how it grows an hour over the second half."""
    later = rows[len(rows) // 2 :]
    slope, _, low, high = theilslopes([row[what] for row in later], [row["s"] / 3600 for row in later])
    read = [row[what] for row in rows]
    hourly = {"per_hour": slope, "per_hour_low": low, "per_hour_high": high}
    return {
        "first": read[0],
        "last": read[-1],
        "highest": max(read),
        **{name: round(float(value), 2) for name, value in hourly.items()},
    }


def main(
    folder: Path, texts: str, minutes: int = 20, rate: float = 200.0,
    p99_ms: Annotated[float, typer.Option()] = 50.0, name: str = "soak",
) -> None:  # fmt: skip
    """Loads a server for so many minutes, prints, saves."""
    os.sched_setaffinity(0, {SERVER_CORE})
    variant, asked = open_variant(folder), read_texts(texts)
    server, url = started(folder, p99_ms)
    os.sched_setaffinity(0, {LOAD_CORE})
    watch, loads = Watch(psutil.Process(server.pid)), list[dict[str, Any]]()
    reader = threading.Thread(target=watch.run)
    reader.start()
    try:
        for minute in range(minutes):
            load = offer(url, asked, LoadOptions(rate=rate, seconds=LOAD_S, p99_ms=p99_ms, seed=minute))
            loads.append({
                "minute": minute, "offered": load.offered, "answered": len(load.latencies_ms),
                "refused": len(load.refused_ms), "errors": sum(load.errors.values()),
                "late": sum(latency > p99_ms for latency in load.latencies_ms),
                "p50_ms": round(load.percentile(50).value, 2), "p99_ms": round(load.percentile(99).value, 2),
            })  # fmt: skip
            print(loads[-1], watch.rows[-1] if watch.rows else "", flush=True)
    finally:
        watch.ended.set()
        reader.join()
        server.terminate()
        server.wait()
    save_result(name, {
        "variant": variant.name, "rate": rate, "minutes": minutes, "p99_ms": p99_ms,
        **{what: growth(watch.rows, what) for what in ("rss_mb", "file_descriptors", "threads")},
        "loads": loads, "readings": watch.rows,
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
