"""How cores are shared out: few inferences with many threads each, or many with one.

It is measured, on the user's texts and under the container's CPU quota, and recorded in `variant.json` for the server.
Threads of one inference wait for each other at every operator, so one inference a core gives the most texts a second;
several threads give the lowest latency to a text that comes alone. How far apart the two are hangs on model and CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from hasten.cores import available_cores
from hasten.errors import DataError
from hasten.files import write_atomically
from hasten.measurement import this_host
from hasten.profiling import Worker
from hasten.variant import MANIFEST, PlanRow, ThreadPlan, Variant
from hasten.workload import random_rows

ROUNDS = 8
BLOCK = 25
WARMUP = 3
SETTLE_S = 0.1

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Samples:
    alone_ms: list[float] = field(default_factory=list[float])
    texts_per_s: list[float] = field(default_factory=list[float])


def layouts(cores: float) -> list[tuple[int, int]]:
    """Ways to share out cores, as inferences at the same time and threads of each; a fraction is rounded both ways."""
    whole = {max(1, math.floor(cores)), math.ceil(cores)}
    return sorted({(workers, n // workers) for n in whole for workers in range(1, n + 1) if n % workers == 0})


def measure_plan(variant: Variant, texts: Sequence[str], progress: Progress | None = None) -> ThreadPlan:
    """Measures every way to share out this machine's cores, in one interleaved run.

    Args:
        variant: What will be served.
        texts: The user's texts, at least one.
        progress: Told how many of how many rounds are done.

    Returns:
        For each way the median latency of a text that comes alone, and the texts a second when as many clients ask as
        there are inferences at the same time.

    Raises:
        DataError: There are no texts.
        MeasurementError: The variant cannot be run.
    """
    if not texts:
        raise DataError("the plan of threads is measured on texts; none were given")
    ways, drawn = layouts(available_cores()), random_rows(len(texts), ROUNDS * BLOCK, seed=0)  # a file may be sorted
    found = [_Samples() for _ in ways]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(variant, threads, workers=n)) for n, threads in ways]
        for number in range(ROUNDS):
            block = [texts[row] for row in drawn[number * BLOCK : (number + 1) * BLOCK]]
            for turn in range(len(ways)) if number % 2 == 0 else reversed(range(len(ways))):
                _sample(workers[turn], ways[turn][0], block, found[turn])
            if progress is not None:
                progress(number + 1, ROUNDS)
    rows = [_row(way, samples) for way, samples in zip(ways, found, strict=True)]
    return ThreadPlan(cpu=this_host().cpu, cores=available_cores(), rows=rows)


def _sample(worker: Worker, clients: int, block: list[str], samples: _Samples) -> None:
    time.sleep(SETTLE_S)
    samples.alone_ms.extend(worker.classify(block, warmup=WARMUP).samples_ms)
    every = block * clients
    samples.texts_per_s.append(len(every) / worker.classify(every, warmup=WARMUP, clients=clients).elapsed_s)


def _row(way: tuple[int, int], samples: _Samples) -> PlanRow:
    p50, rate = float(np.median(samples.alone_ms)), float(np.median(samples.texts_per_s))
    return PlanRow(workers=way[0], threads=way[1], alone_p50_ms=round(p50, 4), texts_per_s=round(rate, 2))


def record_plan(variant: Variant, plan: ThreadPlan) -> Variant:
    """Writes a plan into a folder's `variant.json`; what is hashed stays as it is, and so does the digest."""
    manifest = replace(variant.manifest, plan=plan)
    write_atomically(variant.path / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    return replace(variant, manifest=manifest)
