"""Profiling: latency, quality and memory of several variants, in one interleaved run; and where their time goes.

Every variant runs in a process of its own with the same number of threads. Blocks of texts go to the variants in
turn, in an order drawn anew each time, so that a slow minute of the machine falls on all of them, and so does what a
neighbour leaves behind, as in the caches; a pause before each block lets the threads of the variant before it come to
rest. Each sample is one text, from text to scores.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Self

import msgspec
import numpy as np

from hasten.breakdown import breakdown
from hasten.cores import available_cores
from hasten.errors import DataError, MeasurementError, UsageError
from hasten.intervals import TURN
from hasten.measurement import SCHEMA, Latency, Measurement, Quality, Scenario, this_host
from hasten.profiling_worker import Reply, Request
from hasten.variant import Variant
from hasten.workload import Workload, random_rows

Progress = Callable[[int, int], None]
ORDER = "turns drawn anew for each block"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """How to measure.

    Attributes:
        threads: Threads for every variant, at least 1; None takes the cores at hand.
        samples: Timed requests a variant, at least 1; below 299 no p99 can be judged, and more are needed where
            requests that follow each other take alike.
        block: Requests before the next variant's turn, at least 1.
        warmup: Uncounted requests at the start of each block.
        settle_s: Pause before each block, in which the threads of the variant before it stop spinning.
        breakdown_samples: Requests under the profiler, for where the time goes; 0 leaves that out.
        seed: Seed of the texts' order.
    """

    threads: int | None = None
    samples: int = 1000
    block: int = TURN
    warmup: int = 2
    settle_s: float = 0.1
    breakdown_samples: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UsageError: A value is out of range.
        """
        if self.samples < 1 or self.block < 1 or (self.threads is not None and self.threads < 1):
            raise UsageError(
                f"samples, threads and block must be at least 1, not {self.samples}, {self.threads}, {self.block}"
            )

    @property
    def resolved_threads(self) -> int:
        """The number of threads to use."""
        return self.threads or max(1, int(available_cores()))


class Worker:
    """A process that runs one variant."""

    def __init__(self, variant: Variant, threads: int, *, workers: int = 1) -> None:
        self.variant = variant
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment |= {"TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "hasten.profiling_worker", str(variant.path), str(threads)]
        command.append(str(workers))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def __enter__(self) -> Self:
        """Waits until the variant is loaded."""
        try:
            self._reply()
        except MeasurementError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process."""
        if self._process.stdin:
            with suppress(BrokenPipeError):  # of a process that was killed before it read a command
                self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def classify(self, texts: Sequence[str], *, warmup: int = 0, clients: int = 1) -> Reply:
        """Classifies texts; each client sends one at a time.

        Args:
            texts: The texts.
            warmup: How many of them to run first without counting.
            clients: How many ask at the same time.

        Returns:
            Predictions and timings.

        Raises:
            MeasurementError: The process died.
        """
        if self._process.stdin is None:
            raise MeasurementError(f"{self.variant.name}: its process has no input")
        try:
            self._process.stdin.write(
                msgspec.json.encode(Request(texts=list(texts), warmup=warmup, clients=clients)) + b"\n"
            )
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reply says why
        return self._reply()

    def _reply(self) -> Reply:
        line = self._process.stdout.readline() if self._process.stdout else b""
        if not line:
            raise MeasurementError(
                f"{self.variant.name}: the measuring process ended with status {self._process.wait()}"
            )
        reply = msgspec.json.decode(line, type=Reply)
        if reply.error is not None:
            raise MeasurementError(f"{self.variant.name}: {reply.error}")
        return reply


def profile(
    variants: Sequence[Variant],
    workload: Workload,
    options: ProfileOptions | None = None,
    *,
    scenario: str,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Measures variants against each other in one interleaved run.

    Every row of the workload is classified by every variant, once; the timed requests are those of a random order of
    the rows, gone through again where there are fewer rows than samples.

    Args:
        variants: The variants, at least one.
        workload: The labelled texts of one split.
        options: How; the defaults if None.
        scenario: The scenario's name.
        progress: Called with the requests done and those in all.

    Returns:
        One measurement a variant, in the same order.

    Raises:
        DataError: The workload is empty.
        MeasurementError: A variant cannot be run.
    """
    options = options or ProfileOptions()
    if not len(workload):
        raise DataError(f"{workload.source}: no rows to measure on")
    rows = _requests(workload, options)
    runs = _interleaved(variants, [workload.texts[row] for row in rows], options, progress)
    conditions = Scenario(
        name=scenario, split=workload.name, workload_digest=workload.digest, threads=options.resolved_threads,
        warmup=options.warmup, key=run_key(variants, workload, options, scenario),
    )  # fmt: skip
    return [
        _measurement(v, rows, run, workload, conditions, options.breakdown_samples)
        for v, run in zip(variants, runs, strict=True)
    ]


def run_key(variants: Sequence[Variant], workload: Workload, options: ProfileOptions, scenario: str) -> str:
    """Identity (hex) of an interleaved run: what was measured, on which texts, how and where."""
    host = asdict(this_host())
    how = (asdict(options), options.resolved_threads, ORDER)
    parts = [[v.digest for v in variants], workload.digest, *how, scenario, host]
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()[:16]


def _requests(workload: Workload, options: ProfileOptions) -> list[int]:
    """Row indices in the order asked: all rows in a random one, then again in others until there are enough samples."""
    return random_rows(len(workload), max(options.samples, len(workload)), seed=options.seed)


def _interleaved(
    variants: Sequence[Variant], texts: Sequence[str], options: ProfileOptions, progress: Progress | None
) -> list[list[Reply]]:
    """The replies of every variant, block by block."""
    replies: list[list[Reply]] = [[] for _ in variants]
    total = len(texts) * len(variants)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(variant, options.resolved_threads)) for variant in variants]
        order = np.random.default_rng(options.seed)
        for start in range(0, len(texts), options.block):
            block = texts[start : start + options.block]
            for turn in order.permutation(len(workers)).tolist():
                time.sleep(options.settle_s if len(workers) > 1 else 0)
                replies[turn].append(workers[turn].classify(block, warmup=options.warmup))
            if progress is not None:
                progress((start + len(block)) * len(workers), total)
    return replies


def _measurement(
    variant: Variant, rows: list[int], replies: list[Reply], workload: Workload, conditions: Scenario, samples: int
) -> Measurement:
    answers = [answer for reply in replies for answer in zip(reply.predictions, reply.confidences, strict=True)]
    by_row = dict(zip(reversed(rows), reversed(answers), strict=True))
    predictions, confidences = zip(*(by_row[row] for row in range(len(workload))), strict=True)
    return Measurement(
        schema=SCHEMA,
        variant=variant.name,
        digest=variant.digest,
        format=variant.manifest.format,
        precision=variant.manifest.precision,
        parameters=variant.manifest.parameters,
        size_bytes=variant.size_bytes,
        peak_memory_bytes=max(reply.peak_memory_bytes for reply in replies),
        host=this_host(),
        scenario=conditions,
        latency=_latency(replies),
        quality=Quality(predictions=predictions, expected=workload.labels, confidences=confidences),
        breakdown_ms=breakdown(variant, [workload.texts[row] for row in rows[:samples]], threads=conditions.threads),
    )


def time_only(variants: Sequence[Variant], texts: Sequence[str], options: ProfileOptions) -> list[Latency]:
    """Latencies of variants on texts without labels, in one interleaved run; one a variant, in the same order."""
    return [_latency(replies) for replies in _interleaved(variants, texts, options, None)]


def _latency(replies: list[Reply]) -> Latency:
    return Latency(
        samples_ms=tuple(sample for reply in replies for sample in reply.samples_ms),
        tokens=tuple(tokens for reply in replies for tokens in reply.tokens),
        tokenizer_ms=tuple(sample for reply in replies for sample in reply.tokenizer_ms),
    )
