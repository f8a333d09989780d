"""One loaded variant behind a batcher: what a server answers with, and what a reload puts in its place."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from hasten.asked import RequestError
from hasten.batch_choice import NEVER, Limits
from hasten.batching import Answer, Batcher
from hasten.cores import available_cores
from hasten.costs import CostModel, measure_costs, warm_every_length
from hasten.errors import OverloadedError
from hasten.golden import other_machine, replay_golden
from hasten.predictions import Spread
from hasten.runtime import Logits, Runtime, open_runtime
from hasten.serve_options import ServeOptions
from hasten.server_metrics import Metrics
from hasten.tokenization import Encoding
from hasten.variant import open_variant

Result = TypeVar("Result")

# Characters of text that is not plain: up to there tokenizing takes about what a thread would add (`tokenize_hop`).
AT_ONCE = 100
AT_ONCE_ON_ONE_CORE = 500  # from which the thread would take its time from the loop all the same
YIELDING = 19  # steps of niceness, all there are: the loop takes little, and must have it at once
TOKENIZING_YIELDS = 10  # before inference, which waits for it, and after the loop
FIRST_CHARACTER_S = 5e-7

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A variant in memory.

    Attributes:
        runtime: What classifies; its `encode` and `infer` are called from worker threads, `encode_plain` from the loop.
        name: The variant's name.
        digest: The variant's digest (hex).
        batch_invariant: Whether a text's logits are the same alone and in any batch; if not, texts go one by one.
        max_tokens: Longest input in tokens, at which `runtime.encode` truncates.
        workers: Inferences at the same time, at least 1.
    """

    runtime: Runtime
    name: str
    digest: str
    batch_invariant: bool
    max_tokens: int
    workers: int = 1

    @property
    def identity(self) -> dict[str, str]:
        """Which artifact this is."""
        return {"name": self.name, "digest": self.digest}


def yield_to_the_loop(steps: int = YIELDING) -> None:
    """Gives the calling thread, and those that it starts, a lower priority than the event loop's.

    Where inference takes every core, the loop would otherwise wait for its turn before it could read, refuse or reply.
    On Linux priorities belong to threads (sched(7)); elsewhere, and in a container that forbids it, nothing is changed.

    Args:
        steps: Of niceness.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + steps))


def characters_at_once(cores: float) -> int:
    """Up to how many characters are tokenized on the event loop, where a process has so many cores."""
    return AT_ONCE if cores >= 2 else AT_ONCE_ON_ONE_CORE


async def aside(work: Callable[[], Result]) -> Result:
    """Does some work in a thread that yields to the loop and to what serves."""
    with ThreadPoolExecutor(1, initializer=yield_to_the_loop) as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, work)


def load(folder: Path | str, options: ServeOptions) -> Loaded:
    """Loads a variant folder: checks its hashes, replays its golden logits.

    Args:
        folder: The variant.
        options: How it shares out the cores.

    Returns:
        The variant in memory.

    Raises:
        ArtifactError: The folder is incomplete, altered or cannot be loaded.
        ParityError: This machine computes other logits than those recorded when the folder was made.
    """
    variant = open_variant(folder)
    workers, threads = options.layout(variant.manifest.plan)
    _log.info("%s: %d inferences at the same time, threads of each: %d", variant.name, workers, threads)
    replay_golden(variant, threads=threads)
    for sentence in other_machine(variant):
        _log.warning("%s: %s", variant.name, sentence)
    with ThreadPoolExecutor(1, initializer=yield_to_the_loop) as opener:  # the runtime's own threads inherit from it
        runtime = opener.submit(open_runtime, variant, threads=threads, workers=workers).result()
    return Loaded(
        runtime=runtime, name=variant.name, digest=variant.digest, batch_invariant=variant.manifest.batch_invariant,
        max_tokens=variant.manifest.max_tokens, workers=workers,
    )  # fmt: skip


class Served:
    """A loaded variant behind a batcher of its own.

    Args:
        loaded: The variant.
        options: Limits.
        metrics: What is told of every inference.
        tokenizers: Where texts are tokenized.

    Attributes:
        loaded: The variant.
        batcher: Its queue, once it was started.

    Raises:
        UsageError: A limit is below 1.
    """

    batcher: Batcher[Encoding, Logits]

    def __init__(self, loaded: Loaded, options: ServeOptions, metrics: Metrics, tokenizers: ThreadPoolExecutor) -> None:
        self.loaded, self._metrics, self._tokenizers = loaded, metrics, tokenizers
        # One by one where logits would depend on batch-mates, or shapes of batches would be compiled as they come.
        batches = loaded.batch_invariant and not loaded.runtime.compiles_shapes
        max_batch = options.max_batch if batches else 1
        self._limits = Limits(
            max_batch=max_batch, max_padded_tokens=options.max_padded_tokens, max_queue=options.max_queue
        )
        self.most_rows = min(options.max_rows, self._limits.max_queue)
        self._p99_ms = options.p99_ms
        self._at_once = characters_at_once(available_cores() / options.processes)
        self._tokenizing_rows = self._tokenizing_characters = 0
        self._character_s = Spread(mean=FIRST_CHARACTER_S, deviation=FIRST_CHARACTER_S)
        self._requests = 0
        self._idle = asyncio.Event()

    async def start(self) -> None:
        """Warms up, measures what an inference costs, and opens the queue."""
        costs = await aside(self._warm_up)
        self._say_what_fits(costs)
        self.batcher = Batcher(
            self._compute, self._limits, workers=self.loaded.workers, costs=costs, prepare=self._prepare
        )
        await self.batcher.open()

    def _say_what_fits(self, costs: CostModel) -> None:
        """Else a deadline that the artifact cannot keep here shows only when requests are refused."""
        if self._p99_ms is None:
            return
        name, longest = self.loaded.name, costs.longest_within(self._p99_ms / 1000, self.loaded.max_tokens)
        if not longest:
            _log.warning("%s: no text can be answered within %g ms here: all will be refused", name, self._p99_ms)
        elif longest < self.loaded.max_tokens:
            _log.info("%s: texts above %d tokens take longer than %g ms and are refused", name, longest, self._p99_ms)

    def _warm_up(self) -> CostModel:
        limits = self._limits
        return measure_costs(
            self.loaded.runtime, max_tokens=self.loaded.max_tokens, max_batch=limits.max_batch,
            max_padded_tokens=limits.max_padded_tokens,
        )  # fmt: skip

    def _prepare(self) -> None:
        """Readies a thread that will infer; what is compiled, and a session of its own, a runtime keeps for each."""
        yield_to_the_loop()
        loaded = self.loaded
        if loaded.runtime.compiles_shapes:
            _log.info("%s: compiling each length up to %d tokens", loaded.name, loaded.max_tokens)
            longest = warm_every_length(loaded.runtime, max_tokens=loaded.max_tokens)
            if longest < loaded.max_tokens:
                _log.warning("%s: texts above %d tokens are compiled when they come", loaded.name, longest)
        elif loaded.workers > 1:
            loaded.runtime.infer(loaded.runtime.encode(["a"]))

    async def close(self) -> None:
        """Finishes what was admitted; admits no more."""
        await self.batcher.close()

    @contextlib.contextmanager
    def in_use(self) -> Generator[None]:
        """While a request is answered: until then it is not retired."""
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1
            self._idle.set()

    async def retire(self) -> None:
        """Closes once every request that uses it is answered."""
        while self._requests:
            self._idle.clear()
            await self._idle.wait()
        await self.close()

    async def answer(
        self, texts: list[str], truncate: bool | None, deadline_s: float
    ) -> tuple[list[Answer[Logits]], float]:
        """Classifies texts.

        Args:
            texts: The texts.
            truncate: Whether texts that are too long are cut; they are if None.
            deadline_s: When the answer must stand, by `perf_counter`.

        Returns:
            An answer for each text, and the seconds that tokenizing took.

        Raises:
            OverloadedError: There is no room, or no time before the deadline.
            RequestError: A text is too long and not to be cut (422).
            DataError: A text cannot be tokenized.
        """
        started_s = perf_counter()
        encodings = await self._encode(texts, deadline_s)
        tokenize_s = perf_counter() - started_s
        self._require_whole(encodings, truncate)
        lengths = [max(1, len(encoding)) for encoding in encodings]
        return await self.batcher.submit_all(encodings, lengths, deadline_s), tokenize_s

    def require_time(self, deadline_s: float) -> None:
        """Refuses at no cost what would be late, see `Batcher.require_time`.

        Args:
            deadline_s: When the answer must stand, by `perf_counter`.

        Raises:
            OverloadedError: There is no time.
        """
        if deadline_s < NEVER:
            self.batcher.require_time(deadline_s)

    def _require_whole(self, encodings: Sequence[Encoding], truncate: bool | None) -> None:
        # The tokenizer cuts at the limit, so a text of exactly that length cannot be told from a longer one.
        most = self.loaded.max_tokens
        if truncate is False and any(len(encoding) >= most for encoding in encodings):
            raise RequestError(422, "validation", f"a text is not below {most} tokens; set `truncate`")

    async def _encode(self, texts: list[str], deadline_s: float) -> list[Encoding]:
        # What is being tokenized will queue next: counted here, it is refused before the work and not after it.
        self.batcher.require_room(self._tokenizing_rows + len(texts))
        if (plain := self.loaded.runtime.encode_plain(texts)) is not None:
            return plain
        if (characters := sum(map(len, texts))) <= self._at_once:
            return self.loaded.runtime.encode(texts)
        self._tokenizing_rows += len(texts)
        self._tokenizing_characters += characters
        try:
            self._require_time_to_tokenize(deadline_s)
            loop = asyncio.get_running_loop()
            encodings, taken_s = await loop.run_in_executor(self._tokenizers, self._tokenized, texts, deadline_s)
            self._character_s.observe(taken_s / characters)
            return encodings
        finally:
            self._tokenizing_rows -= len(texts)
            self._tokenizing_characters -= characters

    def _require_time_to_tokenize(self, deadline_s: float) -> None:
        try:
            self.require_time(deadline_s - self._tokenizing_characters * self._character_s.mean)
        except OverloadedError:
            self._character_s.relax()  # a stall must not keep long texts out for ever
            raise

    def _tokenized(self, texts: list[str], deadline_s: float) -> tuple[list[Encoding], float]:
        """In a thread: the encodings, and the seconds they took."""
        if (began_s := perf_counter()) > deadline_s:
            raise OverloadedError("waited too long to be tokenized in time; try again later", reason="expired")
        return self.loaded.runtime.encode(texts), perf_counter() - began_s

    def _compute(self, encodings: Sequence[Encoding]) -> Logits:
        lengths = [len(encoding) for encoding in encodings]
        self._metrics.batch.observe(len(lengths))
        self._metrics.tokens_of("text").inc(sum(lengths))
        self._metrics.tokens_of("padding").inc(len(lengths) * max(lengths) - sum(lengths))
        return self.loaded.runtime.infer(encodings)
