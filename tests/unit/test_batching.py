from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.batch_choice import Limits, take_batch
from hasten.batching import Answer, Batcher
from hasten.errors import OverloadedError, UsageError

T = TypeVar("T")
LENGTHS = st.lists(st.integers(1, 40), max_size=20)
LIMITS = st.builds(Limits, max_batch=st.integers(1, 6), max_padded_tokens=st.integers(1, 120), max_queue=st.just(64))
WIDE = Limits(max_batch=8, max_padded_tokens=1000, max_queue=64)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs it; a hang becomes a failure."""

    async def bounded() -> T:
        async with asyncio.timeout(10):
            return await work

    return asyncio.run(bounded())


class Gate:
    """A compute that says when it is inside a batch, waits to be let through, and fails on items named bad."""

    def __init__(self, *, open_: bool = False) -> None:
        self.batches: list[list[str]] = []
        self.entered, self.opened = threading.Event(), threading.Event()
        if open_:
            self.opened.set()

    def __call__(self, items: Sequence[str]) -> list[str]:
        self.batches.append(list(items))
        self.entered.set()
        assert self.opened.wait(5)
        for item in items:
            if item.startswith("bad"):
                raise ValueError(item)
            if item.startswith("exit"):
                raise SystemExit(item)
            if item.startswith("stop"):
                raise StopIteration(item)
        return [item.upper() for item in items]

    async def inside(self) -> None:
        while not self.entered.is_set():
            await asyncio.sleep(0)


async def settled(tasks: Sequence[asyncio.Task[Any]]) -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


async def admitted(batcher: Batcher[str, str], items: Sequence[str]) -> list[asyncio.Task[Answer[str]]]:
    """Tasks whose items stand in the queue (or are refused) when this returns."""
    tasks = [asyncio.create_task(batcher.submit(item, len(item))) for item in items]
    await asyncio.sleep(0)
    return tasks


@given(LENGTHS, LIMITS)
def test_a_batch_holds_the_oldest_and_keeps_to_the_limits(lengths: list[int], limits: Limits) -> None:
    taken = take_batch(lengths, limits)
    assert (not taken) == (not lengths)
    assert len(taken) <= limits.max_batch
    assert all(a < b for a, b in pairwise(taken))
    if lengths:
        assert taken[0] == 0
    if len(taken) > 1:
        assert len(taken) * max(lengths[position] for position in taken) <= limits.max_padded_tokens


@given(LENGTHS, LIMITS)
def test_no_row_waits_for_more_batches_than_stand_before_it(lengths: list[int], limits: Limits) -> None:
    waiting = list(enumerate(lengths))
    batches = 0
    while waiting:
        taken = set(take_batch([length for _, length in waiting], limits))
        assert all(waiting[place][0] >= batches for place in taken)
        waiting = [row for place, row in enumerate(waiting) if place not in taken]
        batches += 1
    assert batches <= len(lengths)


def test_the_worked_example() -> None:
    limits = Limits(max_batch=8, max_padded_tokens=64, max_queue=8)
    assert take_batch([20, 50, 24, 3], limits) == [0, 2]
    assert take_batch([50, 3], limits) == [0]


@pytest.mark.parametrize("name", ["max_batch", "max_padded_tokens", "max_queue"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0"):
        Limits(**{"max_batch": 1, "max_padded_tokens": 1, "max_queue": 1, name: 0})


def test_an_idle_worker_starts_at_once_and_a_busy_one_gathers() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = Batcher(gate, WIDE)
        first = asyncio.create_task(batcher.submit("first", 5))
        await gate.inside()
        others = await admitted(batcher, ["a", "b", "c"])
        assert batcher.waiting_rows == 3
        await asyncio.sleep(0.05)
        gate.opened.set()
        alone = await first
        assert alone.batch == 1
        assert alone.inference_s >= 0.05 > alone.queue_s
        answers = await asyncio.gather(*others)
        assert [(answer.row, answer.batch) for answer in answers] == [("A", 3), ("B", 3), ("C", 3)]
        assert gate.batches == [["first"], ["a", "b", "c"]]
        assert all(answer.queue_s >= 0.05 and answer.inference_s >= 0 for answer in answers)
        await batcher.close()

    run(scenario())


def test_what_the_queue_cannot_hold_is_refused_at_once() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = Batcher(gate, Limits(max_batch=1, max_padded_tokens=100, max_queue=2))
        tasks = [asyncio.create_task(batcher.submit("running", 7))]
        await gate.inside()
        tasks += await admitted(batcher, ["a", "b"])
        with pytest.raises(OverloadedError, match="2 rows wait"):
            await batcher.submit("late", 4)
        assert not gate.opened.is_set()
        gate.opened.set()
        assert [answer.row for answer in await asyncio.gather(*tasks)] == ["RUNNING", "A", "B"]
        await batcher.close()

    run(scenario())


def test_rows_that_belong_together_are_admitted_all_or_none() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = Batcher(gate, Limits(max_batch=2, max_padded_tokens=100, max_queue=2))
        running = asyncio.create_task(batcher.submit("running", 7))
        await gate.inside()
        with pytest.raises(OverloadedError):
            await batcher.submit_all(["a", "b", "c"], [1, 1, 1])
        assert batcher.waiting_rows == 0
        pair = asyncio.create_task(batcher.submit_all(["a", "b"], [1, 1]))
        await asyncio.sleep(0)
        gate.opened.set()
        assert [answer.row for answer in await pair] == ["A", "B"]
        await running
        await batcher.close()

    run(scenario())


@pytest.mark.parametrize("cost", [0, -1, None])
def test_an_unusable_cost_fails_its_caller_and_nobody_else(cost: Any) -> None:
    """Ray Serve #66140: an exception of the sizing function ended the batching for good."""

    async def scenario() -> None:
        batcher = Batcher(Gate(open_=True), WIDE)
        with pytest.raises((ValueError, TypeError)):
            await batcher.submit("odd", cost)
        assert batcher.waiting_rows == 0
        assert (await batcher.submit("next", 4)).row == "NEXT"
        await batcher.close()

    run(scenario())


def test_cancelled_rows_leave_the_queue_make_room_and_are_not_computed() -> None:
    """Ray Serve #50046: a batch with cancelled requests in it hung the deployment."""

    async def scenario() -> None:
        gate = Gate()
        batcher = Batcher(gate, Limits(max_batch=4, max_padded_tokens=100, max_queue=2))
        running = asyncio.create_task(batcher.submit("running", 7))
        await gate.inside()
        gone = await admitted(batcher, ["gone1", "gone2"])
        for task in gone:
            task.cancel()
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in await settled(gone))
        assert batcher.waiting_rows == 0
        stays = await admitted(batcher, ["a", "b"])
        gate.opened.set()
        assert [answer.row for answer in await asyncio.gather(running, *stays)] == ["RUNNING", "A", "B"]
        assert gate.batches == [["running"], ["a", "b"]]
        await batcher.close()

    run(scenario())


def test_a_row_cancelled_in_the_same_moment_is_not_computed() -> None:
    async def scenario() -> None:
        gate = Gate(open_=True)
        batcher = Batcher(gate, WIDE)
        gate.opened.clear()
        running = asyncio.create_task(batcher.submit("running", 7))
        await gate.inside()
        gone, stays = await admitted(batcher, ["gone", "stays"])
        gate.opened.set()
        while not running.done():  # the next batch is chosen while the cancelled task has not run yet
            gone.cancel()
            await asyncio.sleep(0)
        assert (await stays).row == "STAYS"
        assert gate.batches == [["running"], ["stays"]]
        await batcher.close()

    run(scenario())


def test_what_belongs_to_a_failed_row_is_not_computed_for_nobody() -> None:
    async def scenario() -> None:
        gate = Gate(open_=True)
        batcher = Batcher(gate, Limits(max_batch=1, max_padded_tokens=100, max_queue=9))
        with pytest.raises(ValueError, match="bad"):
            await batcher.submit_all(["bad", "at once", "later", "last"], [1, 1, 1, 1])
        assert (await batcher.submit("next", 1)).row == "NEXT"
        assert gate.batches in ([["bad"], ["at once"], ["next"]], [["bad"], ["next"]])
        await batcher.close()

    run(scenario())


def test_a_batch_is_looked_for_among_the_oldest_alone() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = Batcher(gate, Limits(max_batch=2, max_padded_tokens=20, max_queue=99))
        running = asyncio.create_task(batcher.submit("running", 7))
        await gate.inside()
        waiting = {"short": 1, "long1": 15, "long2": 15, "long3": 15, "tiny": 1, "last": 1}
        tasks = [asyncio.create_task(batcher.submit(name, tokens)) for name, tokens in waiting.items()]
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(running, *tasks)
        # The tiny one would go well with the short one, but stands behind the four that are looked at.
        assert gate.batches[1:] == [["short"], ["long1"], ["long2"], ["long3"], ["tiny", "last"]]
        await batcher.close()

    run(scenario())


def test_a_row_cancelled_while_it_is_computed_harms_no_mate() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = Batcher(gate, WIDE)
        together = asyncio.create_task(batcher.submit_all(["x", "y"], [1, 1]))
        await gate.inside()
        mate = (await admitted(batcher, ["mate"]))[0]
        together.cancel()
        gate.opened.set()
        assert (await mate).row == "MATE"
        assert (await batcher.submit("next", 4)).row == "NEXT"
        await batcher.close()

    run(scenario())


@pytest.mark.parametrize(("bad", "error"), [("bad", ValueError), ("exit", RuntimeError), ("stop", RuntimeError)])
def test_of_a_failed_batch_only_the_culprit_fails(bad: str, error: type[Exception]) -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = Batcher(gate, WIDE)
        running = asyncio.create_task(batcher.submit("running", 7))
        await gate.inside()
        tasks = await admitted(batcher, ["a", bad, "b"])
        gate.opened.set()
        await running
        a, failed, b = await settled(tasks)
        assert (a.row, b.row) == ("A", "B")
        assert isinstance(failed, error)
        assert bad in f"{failed} {failed.__cause__}"
        assert gate.batches[1:] == [["a", bad, "b"], ["a"], [bad], ["b"]]
        await batcher.close()

    run(scenario())


def test_a_compute_that_loses_rows_is_a_failure_and_not_a_mix_up() -> None:
    async def scenario() -> None:
        batcher: Batcher[str, str] = Batcher(lambda items: list(items)[:-1], WIDE)
        with pytest.raises(RuntimeError, match="0 rows for 1 items"):
            await batcher.submit("a", 1)
        await batcher.close()

    run(scenario())


KINDS = st.sampled_from(["good", "bad", "exit", "stop", "cancelled"])


@given(st.lists(st.tuples(KINDS, st.integers(1, 40)), min_size=1, max_size=24), LIMITS, st.integers(1, 3))
def test_one_bad_or_cancelled_request_never_harms_its_mates(
    plan: list[tuple[str, int]], limits: Limits, workers: int
) -> None:
    """The signature property; Ray Serve #50046 and #66140 and MLServer #1312 are what it is like not to have it."""

    async def scenario() -> None:
        gate = Gate()
        batcher = Batcher(gate, limits, workers=workers)
        plugs = [asyncio.create_task(batcher.submit(f"plug{worker}", 1)) for worker in range(workers)]
        await gate.inside()
        names = [f"{kind}-{number}" for number, (kind, _) in enumerate(plan)]
        tasks = [
            asyncio.create_task(batcher.submit(name, tokens)) for name, (_, tokens) in zip(names, plan, strict=True)
        ]
        await asyncio.sleep(0)
        for name, task in zip(names, tasks, strict=True):
            if name.startswith("cancelled"):
                task.cancel()
        gate.opened.set()
        outcomes = await settled(tasks)
        for name, outcome in zip(names, outcomes, strict=True):
            _check(name, outcome)
        computed = {item for batch in gate.batches for item in batch}
        assert not any(item.startswith("cancelled") for item in computed)
        assert all(len(batch) <= limits.max_batch for batch in gate.batches)
        assert (await batcher.submit("afterwards", 1)).row == "AFTERWARDS"
        await asyncio.gather(*plugs)
        await batcher.close()

    run(scenario())


def _check(name: str, outcome: Any) -> None:
    if name.startswith("good"):
        assert outcome.row == name.upper()
    elif name.startswith("cancelled"):
        assert isinstance(outcome, asyncio.CancelledError)
    else:
        assert isinstance(outcome, (ValueError, RuntimeError))
        assert name in f"{outcome} {outcome.__cause__}"


def test_close_finishes_what_was_admitted_and_refuses_the_rest() -> None:
    async def scenario() -> None:
        threads = threading.active_count()
        gate = Gate()
        batcher = Batcher(gate, Limits(max_batch=1, max_padded_tokens=100, max_queue=8))
        tasks = await admitted(batcher, ["a", "b", "c"])
        await gate.inside()
        closings = [asyncio.create_task(batcher.close()) for _ in range(2)]
        await asyncio.sleep(0)
        assert batcher.closing
        with pytest.raises(OverloadedError, match="closing"):
            await batcher.submit("late", 4)
        gate.opened.set()
        await asyncio.gather(*closings)
        assert [answer.row for answer in await asyncio.gather(*tasks)] == ["A", "B", "C"]
        await batcher.close()
        assert threading.active_count() == threads

    run(scenario())


def test_several_workers_compute_at_the_same_time() -> None:
    async def scenario() -> None:
        meeting = threading.Barrier(2)

        def compute(items: Sequence[str]) -> list[str]:
            meeting.wait(5)
            return list(items)

        batcher = Batcher(compute, Limits(max_batch=1, max_padded_tokens=10, max_queue=8), workers=2)
        assert [answer.row for answer in await batcher.submit_all(["a", "b"], [1, 1])] == ["a", "b"]
        await batcher.close()

    run(scenario())


def test_a_cancelled_close_can_be_repeated() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = Batcher(gate, WIDE)
        task = asyncio.create_task(batcher.submit("a", 1))
        await gate.inside()
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        closing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await closing
        gate.opened.set()
        await batcher.close()
        assert (await task).row == "A"

    run(scenario())
