"""Dynamic batching and admission: rows that wait, few workers, no timer.

A batch starts as soon as a worker is free, with what waits at that moment, so an idle server adds no delay and a busy
one batches by itself. A row joins a batch only where the costs say that together is cheaper than one after the other,
and where it makes no mate late. The queue is bounded; a row is refused at once where it could only be answered after
its deadline, and one whose deadline cannot be kept any more is not computed. The property this module is built for:
**one bad or cancelled request never harms its mates**.

Non-goals: models, HTTP, priorities. A `Batcher` belongs to one event loop and is not to be called from other threads.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, TypeVar

from hasten.batch_choice import NEVER, Limits, take_batch
from hasten.errors import OverloadedError
from hasten.predictions import Costs, NoCosts, Spread
from hasten.workers import Workers

Item = TypeVar("Item")
Row = TypeVar("Row")


LATE = "the answer would come after its deadline; try again later"
LEAST_WATCH_S = 1e-3  # between two looks at who waited too long
PROBE_EVERY, PROBE_SHARE = 20, 0.1  # of what an idle batcher would refuse; of the predicted time that must be left
FIRST_DEVIATION_S = 5e-4
LOOK_AHEAD = 2  # most batches of rows to choose one from: beyond, looking would cost more than the rows found save


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Generic[Row]):
    """What became of one row.

    Attributes:
        row: What `compute` gave for the item.
        queue_s: From admission to the start of its batch.
        inference_s: Duration of its batch, shared by all rows in it.
        batch: Rows in its batch, at least 1.
    """

    row: Row
    queue_s: float
    inference_s: float
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finished(Generic[Row]):
    outcomes: list[Row | _Failure]
    started_s: float
    ended_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waiter(Generic[Item, Row]):
    item: Item
    cost_tokens: int
    admitted_s: float
    deadline_s: float
    alone_s: float  # what it should take, by the costs when it was admitted
    outcome: asyncio.Future[Answer[Row] | _Failure]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Batch(Generic[Item, Row]):
    rows: list[_Waiter[Item, Row]]
    longest_tokens: int
    done_s: float  # when it should be done, by the costs


class Batcher(Generic[Item, Row]):
    """Gathers submitted rows into batches and computes them in worker threads."""

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Iterable[Row]],
        limits: Limits,
        *,
        workers: int = 1,
        costs: Costs | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            compute: One row for each item, in order; called in a worker thread, with at least one item.
            limits: Bounds of a batch and of the queue.
            workers: Batches computed at the same time, at least 1; above 1, `compute` must be thread-safe.
            costs: What batches take; learns from those that are computed. None knows nothing.
            prepare: Called once in each worker thread before it computes; may raise where `open` asks for it.
        """
        self._compute = compute
        self._limits = limits
        self._workers = workers
        self._pool = Workers(self._run, self._settle, count=workers, prepare=prepare)
        self._waiting: list[_Waiter[Item, Row]] = []
        self._waiting_s = 0.0  # what they will take; asked far more often than it changes
        self._running = set[_Batch[Item, Row]]()
        self._idle = asyncio.Event()
        self._costs = costs or NoCosts()
        self._lateness_s = Spread(mean=0.0, deviation=FIRST_DEVIATION_S)  # of answers, against their prediction
        self._own_s = Spread(mean=0.0, deviation=FIRST_DEVIATION_S)  # of rows that are submitted together
        self._refused_idle = 0  # since one was computed all the same
        self._closing = False
        self._watch: asyncio.TimerHandle | None = None  # until the earliest deadline of those who wait
        self._watched_s = NEVER

    async def open(self) -> None:
        """Starts the worker threads and waits until each is prepared; raises what that raised."""
        await self._pool.open()

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    @property
    def waiting_rows(self) -> int:
        """Rows that wait for a worker."""
        return len(self._waiting)

    def require_room(self, rows: int) -> None:
        """Checks that more rows would be admitted now.

        Args:
            rows: How many.

        Raises:
            OverloadedError: They would not: the queue is too full, or the batcher is closing.
        """
        if self._closing:
            raise OverloadedError("closing: no new requests are taken", reason="closing")
        if len(self._waiting) + rows > self._limits.max_queue:
            self._drop_done()
        if (waiting := len(self._waiting)) + rows > self._limits.max_queue:
            raise OverloadedError(
                f"{waiting} rows wait, {rows} more would exceed the limit of {self._limits.max_queue}; try again later",
                reason="queue full", retry_after_s=self.queued_s(),
            )  # fmt: skip

    def queued_s(self) -> float:
        """Predicted seconds until a worker is free for a row that comes now."""
        now_s = perf_counter()
        if self._workers - len(self._running) > len(self._waiting):
            return 0.0
        running_s = sum(abs(batch.done_s - now_s) for batch in self._running)  # overdue: for as long again
        return (running_s + self._waiting_s) / self._workers

    def require_time(self, deadline_s: float) -> None:
        """Checks that rows of which nothing is known yet would be answered in time.

        Where others wait, they are taken to need what rows that are submitted together lately need: a full queue ends
        just where one more would be late. Where nobody does, they are taken to need nothing, and where nothing is
        computed either, only a deadline that is past is refused.

        Args:
            deadline_s: When they must be answered, on the clock of `perf_counter`.

        Raises:
            OverloadedError: They could only be answered late.
        """
        if (late_s := self.late_s(deadline_s)) > 0:
            raise OverloadedError(LATE, reason="late", retry_after_s=late_s)

    def late_s(self, deadline_s: float) -> float:
        """By how many seconds such rows would miss a deadline, see `require_time`; none above 0 where they would not.

        Args:
            deadline_s: When they must be answered, on the clock of `perf_counter`.

        Returns:
            Seconds.
        """
        left_s = deadline_s - perf_counter()
        if not self._running and not self._waiting:
            return -left_s  # the margin is for what is known: `_admit` judges, and now and then tries it
        own_s = self._own_s.mean if self._waiting else 0.0
        return self._late_s(self.queued_s() + own_s, left_s)

    def _judged_late_s(self, ahead_s: float, left_s: float) -> float:
        """`_late_s` of what will be refused for it, from which it is to be learnt."""
        late_s, idle = self._late_s(ahead_s, left_s), not self._running and not self._waiting
        # What was learnt must not close the door for ever; what was hopeless from the start says nothing of it.
        if late_s > 0 and idle and self._costs.at_start(ahead_s) + self._lateness_s.first_bound <= left_s:
            self._costs.relax()
            self._lateness_s.relax()
        return late_s

    def _late_s(self, ahead_s: float, left_s: float) -> float:
        return ahead_s + max(0.0, self._lateness_s.bound) - left_s

    def _probes(self, ahead_s: float, left_s: float) -> bool:
        """Whether to compute what is predicted to be late, to learn if it is true: now and then, while idle.

        The machine may have been busy when the costs were measured; where all is refused, nothing would correct them.
        """
        if self._running or self._waiting or self._late_s(ahead_s, left_s) <= 0 or left_s < PROBE_SHARE * ahead_s:
            return False
        self._refused_idle = (self._refused_idle + 1) % PROBE_EVERY
        return self._refused_idle == 0

    async def submit(self, item: Item, cost_tokens: int, deadline_s: float = NEVER) -> Answer[Row]:
        """Computes one item, as `submit_all` does several; cancel the call to take it out of the queue."""
        return (await self.submit_all([item], [cost_tokens], deadline_s))[0]

    async def submit_all(
        self, items: Sequence[Item], costs_tokens: Sequence[int], deadline_s: float = NEVER
    ) -> list[Answer[Row]]:
        """Computes several items that belong together: all are admitted, or none.

        Args:
            items: What `compute` takes.
            costs_tokens: Their lengths, each at least 1.
            deadline_s: When they must be answered, on the clock of `perf_counter`.

        Returns:
            One answer for each item, in order, when all are there.

        Raises:
            OverloadedError: There is no room or no time for all, or the batcher is closing, all raised at once; or the
                deadline came too near while they waited.
            ValueError: A cost is below 1, or there are more or fewer costs than items.
            Exception: What `compute` raised for the first item that failed.
        """
        admitted, predicted_s = self._admit(items, costs_tokens, deadline_s)
        answers: list[Answer[Row]] = []
        try:
            for outcome in admitted:
                if isinstance(found := await outcome, _Failure):
                    raise found.error
                answers.append(found)
        except BaseException:
            for outcome in admitted:
                outcome.cancel()
            self._drop_done()
            raise
        # By now, when the answer can be sent; what came early makes none late.
        self._lateness_s.observe(max(0.0, perf_counter() - predicted_s))
        return answers

    def _admit(
        self, items: Sequence[Item], costs_tokens: Sequence[int], deadline_s: float
    ) -> tuple[list[asyncio.Future[Answer[Row] | _Failure]], float]:
        """Puts them into the queue; what becomes of each, and when all should be done."""
        self.require_room(len(items))
        # Checked while only this call can fail: an unusable cost inside the queue would fail every later batch.
        if any(tokens < 1 for tokens in costs_tokens):
            raise ValueError(f"costs in tokens are {list(costs_tokens)}; each must be at least 1")
        now_s, loop = perf_counter(), asyncio.get_running_loop()
        each_s = [self._costs.seconds(1, tokens) for tokens in costs_tokens]
        own_s = max(max(each_s, default=0.0), sum(each_s) / self._workers)
        ahead_s = self.queued_s() + own_s
        if deadline_s < NEVER:
            self._own_s.observe(own_s)
            if self._probes(ahead_s, deadline_s - now_s):
                deadline_s = NEVER
            elif (late_s := self._judged_late_s(ahead_s, deadline_s - now_s)) > 0:
                raise OverloadedError(LATE, reason="late", retry_after_s=late_s)
        admitted: list[_Waiter[Item, Row]] = [
            _Waiter(
                item=item,
                cost_tokens=tokens,
                admitted_s=now_s,
                deadline_s=deadline_s,
                alone_s=alone_s,
                outcome=loop.create_future(),
            )
            for item, tokens, alone_s in zip(items, costs_tokens, each_s, strict=True)
        ]
        self._waiting += admitted
        self._waiting_s += sum(each_s)
        self._start_batches()
        self._watch_deadline(deadline_s)
        return [waiter.outcome for waiter in admitted], now_s + ahead_s

    def _watch_deadline(self, deadline_s: float) -> None:
        """Sees to it that who waits is told when it is too late, also where no worker gets free."""
        if self._waiting and deadline_s < self._watched_s:
            if self._watch is not None:
                self._watch.cancel()
            after_s = max(LEAST_WATCH_S, deadline_s - perf_counter())
            self._watch, self._watched_s = asyncio.get_running_loop().call_later(after_s, self._expire), deadline_s

    def _expire(self) -> None:
        self._watch, self._watched_s = None, NEVER
        self._wait(self._in_time(len(self._waiting))[0])
        self._watch_deadline(min((waiter.deadline_s for waiter in self._waiting), default=NEVER))

    def _start_batches(self) -> None:
        while self._waiting and len(self._running) < self._workers and (rows := self._next_batch()):
            longest = max(waiter.cost_tokens for waiter in rows)
            done_s = perf_counter() + self._costs.seconds(len(rows), longest)
            self._running.add(batch := _Batch(rows=rows, longest_tokens=longest, done_s=done_s))
            self._pool.start(batch)

    def _wait(self, waiting: list[_Waiter[Item, Row]]) -> None:
        self._waiting = waiting
        self._waiting_s = sum([waiter.alone_s for waiter in waiting])

    def _drop_done(self) -> None:
        # Nobody waits for a cancelled row any more: to compute it would only delay the others.
        self._wait([waiter for waiter in self._waiting if not waiter.outcome.done()])

    def _next_batch(self) -> list[_Waiter[Item, Row]]:
        oldest, younger = self._in_time(LOOK_AHEAD * self._limits.max_batch)
        lengths, now_s = [waiter.cost_tokens for waiter in oldest], perf_counter()
        left_s = [waiter.deadline_s - now_s for waiter in oldest]
        fair = self._fair_share(len(oldest) + len(younger))
        taken = set(take_batch(lengths, self._limits, self._costs, left_s)[:fair])
        self._wait([waiter for position, waiter in enumerate(oldest) if position not in taken] + younger)
        return [waiter for position, waiter in enumerate(oldest) if position in taken]

    def _fair_share(self, waiting: int) -> int:
        """Rows of a batch that leave every idle worker its share of what waits."""
        return max(1, math.ceil(waiting / max(1, self._workers - len(self._running))))

    def _in_time(self, most: int) -> tuple[list[_Waiter[Item, Row]], list[_Waiter[Item, Row]]]:
        """The oldest that can still be answered in time, and those behind them; others before are told so."""
        now_s, kept = perf_counter(), list[_Waiter[Item, Row]]()
        for position, waiter in enumerate(self._waiting):
            if len(kept) == most:
                return kept, self._waiting[position:]
            if waiter.outcome.done():
                continue
            if now_s + waiter.alone_s <= waiter.deadline_s:
                kept.append(waiter)
            else:
                error = OverloadedError("waited too long to be answered in time; try again later", reason="expired")
                waiter.outcome.set_result(_Failure(error=error))
        return kept, []

    def _run(self, batch: _Batch[Item, Row]) -> _Finished[Row]:
        started_s = perf_counter()
        outcomes = _outcomes(self._compute, [waiter.item for waiter in batch.rows])
        return _Finished(outcomes=outcomes, started_s=started_s, ended_s=perf_counter())

    def _settle(self, batch: _Batch[Item, Row], finished: _Finished[Row]) -> None:
        self._running.discard(batch)
        rows = batch.rows
        if not any(isinstance(outcome, _Failure) for outcome in finished.outcomes):
            self._costs.observe(len(rows), batch.longest_tokens, finished.ended_s - finished.started_s)
        for waiter, outcome in zip(rows, finished.outcomes, strict=True):
            if not waiter.outcome.done():
                waiter.outcome.set_result(_answer(waiter, outcome, finished, len(rows)))
        self._start_batches()
        if not self._running:
            self._idle.set()

    async def close(self) -> None:
        """Takes no more rows, finishes those that were admitted, and ends the worker threads.

        May be called more than once, also at the same time.
        """
        self._closing = True
        while self._running:
            self._idle.clear()
            await self._idle.wait()
        if self._watch is not None:
            self._watch.cancel()
        self._pool.close()


def _outcomes(compute: Callable[[Sequence[Item]], Iterable[Row]], items: Sequence[Item]) -> list[Row | _Failure]:
    try:
        rows: list[Row | _Failure] = list(compute(items))
        if len(rows) != len(items):
            raise RuntimeError(f"compute gave {len(rows)} rows for {len(items)} items")
    except BaseException as error:  # even SystemExit from a library: whatever is not caught here fails the whole batch
        if len(items) == 1:
            return [_Failure(error=error if isinstance(error, Exception) else RuntimeError(repr(error)))]
        # A failed batch does not say which row was at fault, and the mates of a bad row must get their answers: alone,
        # only the culprit fails.
        return [outcome for item in items for outcome in _outcomes(compute, [item])]
    return rows


def _answer(
    waiter: _Waiter[Item, Row], outcome: Row | _Failure, finished: _Finished[Row], batch: int
) -> Answer[Row] | _Failure:
    if isinstance(outcome, _Failure):
        return outcome
    return Answer(
        row=outcome,
        queue_s=finished.started_s - waiter.admitted_s,
        inference_s=finished.ended_s - finished.started_s,
        batch=batch,
    )
