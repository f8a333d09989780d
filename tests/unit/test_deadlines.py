"""Deadlines: what would be late is refused at once, what became late is not computed, and nobody is made late."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter, sleep

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_batching import LENGTHS, LIMITS, WIDE, Gate, run

from hasten.batch_choice import GAIN, NEVER, Limits, take_batch
from hasten.batching import PROBE_EVERY, Batcher
from hasten.errors import OverloadedError


@dataclass(frozen=True, slots=True)
class Linear:
    """A start and a time for each padded token, exactly."""

    start_s: float = 0.0
    token_s: float = 0.001

    def seconds(self, rows: int, tokens: int, /) -> float:
        return self.start_s + self.token_s * rows * tokens

    def bound(self, rows: int, tokens: int, /) -> float:
        return 1.1 * self.seconds(rows, tokens)

    def observe(self, _rows: int, _tokens: int, _seconds: float, /) -> None:
        """Knows it all already."""

    def at_start(self, seconds: float, /) -> float:
        """The same."""
        return seconds

    def relax(self) -> None:
        """Has nothing to go back to."""


ALONE = Limits(max_batch=1, max_padded_tokens=100, max_queue=100)
COSTS = st.builds(Linear, start_s=st.floats(0, 0.1), token_s=st.floats(1e-4, 0.01))


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 2)), max_size=20), LIMITS, COSTS)
def test_nobody_joins_who_makes_it_dearer_or_makes_a_mate_late(
    rows: list[tuple[int, float]], limits: Limits, costs: Linear
) -> None:
    lengths, left_s = [tokens for tokens, _ in rows], [left for _, left in rows]
    taken = take_batch(lengths, limits, costs, left_s)
    assert taken[:1] == ([0] if rows else [])
    if len(taken) > 1:
        length = max(lengths[position] for position in taken)
        assert costs.bound(len(taken), length) <= min(left_s[position] for position in taken)
        assert costs.seconds(len(taken), length) <= sum(costs.seconds(1, lengths[p]) for p in taken)


@given(LENGTHS)
def test_where_a_batch_saves_nothing_texts_go_one_by_one(lengths: list[int]) -> None:
    assert take_batch(lengths, WIDE, Linear(start_s=0.0)) == [0][: len(lengths)]


def test_equal_lengths_share_a_start_that_is_worth_it() -> None:
    assert take_batch([10] * 5, WIDE, Linear(start_s=0.01 / GAIN)) == [0, 1, 2, 3, 4]


def test_what_would_be_late_is_refused_at_once_and_says_when_to_come_again() -> None:
    async def script() -> None:
        gate = Gate()
        batcher = Batcher(gate, WIDE, costs=Linear(token_s=0.1))
        running = asyncio.create_task(batcher.submit("x" * 10, 10))
        await gate.inside()
        assert batcher.queued_s() == pytest.approx(1.0, abs=0.2)
        with pytest.raises(OverloadedError, match="after its deadline") as refused:
            await batcher.submit("y", 1, perf_counter() + 0.5)
        assert refused.value.reason == "late"
        assert refused.value.retry_after_s == pytest.approx(0.6, abs=0.2)
        fits = asyncio.create_task(batcher.submit("z", 1, perf_counter() + 5))
        await asyncio.sleep(0)
        gate.opened.set()
        assert [answer.row for answer in await asyncio.gather(running, fits)] == ["X" * 10, "Z"]
        await batcher.close()

    run(script())


def test_what_became_late_while_it_waited_is_told_so_and_not_computed() -> None:
    async def script() -> None:
        gate = Gate()
        batcher = Batcher(gate, WIDE)
        running = asyncio.create_task(batcher.submit("running", 7))
        await gate.inside()
        late = asyncio.create_task(batcher.submit("late", 4, perf_counter() + 0.02))
        patient = asyncio.create_task(batcher.submit("patient", 7, perf_counter() + 60))
        await asyncio.sleep(0.05)
        gate.opened.set()
        outcomes = await asyncio.gather(running, late, patient, return_exceptions=True)
        assert isinstance(outcomes[1], OverloadedError)
        assert outcomes[1].reason == "expired"
        assert outcomes[2].row == "PATIENT"
        assert [item for batch in gate.batches for item in batch] == ["running", "patient"]
        await batcher.close()

    run(script())


def test_what_waits_behind_a_stall_is_told_when_it_is_too_late_for_it() -> None:
    async def script() -> None:
        gate = Gate()
        batcher = Batcher(gate, WIDE)
        stalled = asyncio.create_task(batcher.submit("stalled", 7))
        await gate.inside()
        began_s = perf_counter()
        outcomes = await asyncio.gather(
            *(batcher.submit("late", 4, began_s + wait_s) for wait_s in (0.05, 0.02, 0.08)), return_exceptions=True
        )
        assert [outcome.reason for outcome in outcomes if isinstance(outcome, OverloadedError)] == ["expired"] * 3
        assert perf_counter() - began_s < 1
        gate.opened.set()
        assert (await stalled).row == "STALLED"
        await batcher.close()

    run(script())


def test_a_far_deadline_hides_no_near_one() -> None:
    async def script() -> float:
        gate = Gate()
        batcher = Batcher(gate, WIDE)
        stalled = asyncio.create_task(batcher.submit("stalled", 7))
        await gate.inside()
        began_s = perf_counter()
        far = asyncio.create_task(batcher.submit("far", 4, began_s + 3600))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="waited too long"):
            await batcher.submit("near", 4, began_s + 0.05)
        told_s = perf_counter() - began_s
        gate.opened.set()
        await asyncio.gather(stalled, far)
        await batcher.close()
        return told_s

    assert run(script()) < 1


def test_what_is_hopeless_from_the_start_changes_no_prediction() -> None:
    """Costs that have learnt that the machine is slower than at start."""

    class Learnt(Linear):
        relaxed = 0

        def relax(self) -> None:
            Learnt.relaxed += 1

        def at_start(self, seconds: float, /) -> float:
            return seconds / 2

    async def script() -> tuple[int, int]:
        batcher, counts = Batcher(Gate(open_=True), ALONE, costs=Learnt(token_s=0.1)), list[int]()
        for left_s in (-0.1, 0.04, 0.09):  # over, below what it took at start, between the two
            with pytest.raises(OverloadedError, match="after its deadline"):
                await batcher.submit("x", 1, perf_counter() + left_s)
            counts.append(Learnt.relaxed)
        await batcher.close()
        return counts[1], counts[2]

    assert run(script()) == (0, 1)


def test_what_is_overdue_is_taken_to_need_as_long_again() -> None:
    async def script() -> None:
        gate = Gate()
        batcher = Batcher(gate, WIDE, costs=Linear(token_s=0.001))
        stalled = asyncio.create_task(batcher.submit("x", 1))
        await gate.inside()
        await asyncio.sleep(0.2)
        assert batcher.queued_s() == pytest.approx(0.2, abs=0.1)
        with pytest.raises(OverloadedError, match="after its deadline"):
            await batcher.submit("y", 1, perf_counter() + 0.05)
        gate.opened.set()
        await stalled
        await batcher.close()

    run(script())


def test_answers_that_come_early_never_make_an_idle_server_refuse() -> None:
    """The rows of a large request are each predicted to end with the last of them."""

    async def script() -> int:
        def compute(items: Sequence[str]) -> list[str]:
            sleep(0.005 * len(items))
            return list(items)

        batcher = Batcher(compute, ALONE, costs=Linear(token_s=0.005))
        refused = 0
        for _ in range(4):
            await batcher.submit_all(["together"] * 24, [1] * 24)
            for _ in range(5):
                try:
                    await batcher.submit("alone", 1, perf_counter() + 0.03)
                except OverloadedError:
                    refused += 1
        await batcher.close()
        return refused

    assert run(script()) == 0


def test_several_workers_share_what_is_submitted_together() -> None:
    async def script() -> None:
        gate = Gate(open_=True)
        batcher = Batcher(gate, ALONE, workers=4, costs=Linear(token_s=0.1))
        with pytest.raises(OverloadedError, match="after its deadline"):
            await batcher.submit_all(["a"] * 8, [1] * 8, perf_counter() + 0.15)
        await batcher.submit_all(["a"] * 8, [1] * 8, perf_counter() + 0.4)
        await batcher.close()

    run(script())


def test_after_a_stall_an_idle_server_comes_back() -> None:
    async def script() -> int:
        gate = Gate()
        batcher = Batcher(gate, WIDE)
        tasks = [asyncio.create_task(batcher.submit("x", 1)) for _ in range(40)]
        await gate.inside()
        await asyncio.sleep(0.3)  # everybody is late now, which makes the margin wide
        gate.opened.set()
        await asyncio.gather(*tasks)
        for refused in range(1000):
            try:
                await batcher.submit("y", 1, perf_counter() + 0.05)
            except OverloadedError:
                continue
            return refused
        return -1

    assert 0 < run(script()) < 200


def test_idle_workers_share_what_waits() -> None:
    async def script() -> None:
        gate = Gate(open_=True)
        batcher = Batcher(gate, WIDE, workers=2)
        await batcher.submit_all(["a", "b", "c", "d"], [1] * 4)
        assert sorted(map(len, gate.batches)) == [2, 2]
        await batcher.close()

    run(script())


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_without_costs_and_deadlines_nothing_is_ever_late(left_s: float) -> None:
    if left_s > 0:
        assert take_batch([3, 3], WIDE, None, [NEVER, left_s]) == [0, 1]


def test_where_others_wait_a_request_needs_what_requests_lately_needed() -> None:
    async def script() -> None:
        gate = Gate(open_=True)
        batcher = Batcher(gate, Limits(max_batch=1, max_padded_tokens=100, max_queue=8), costs=Linear(token_s=0.01))
        for _ in range(200):
            await batcher.submit("a", 10, perf_counter() + 60)
            await batcher.submit("without a deadline", 90)  # never refused, so nothing to guess by
        gate.opened.clear()
        gate.entered.clear()
        running = asyncio.create_task(batcher.submit("running", 10))
        await gate.inside()
        batcher.require_time(perf_counter() + 0.15)
        waiting = asyncio.create_task(batcher.submit("waiting", 10))
        await asyncio.sleep(0)
        batcher.require_time(perf_counter() + 0.35)
        with pytest.raises(OverloadedError, match="after its deadline"):
            batcher.require_time(perf_counter() + 0.25)
        gate.opened.set()
        await asyncio.gather(running, waiting)
        batcher.require_time(perf_counter() + 0.05)  # an idle server does not refuse on a guess
        await batcher.close()

    run(script())


def test_a_deadline_within_the_first_margin_is_tried_now_and_then() -> None:
    async def script() -> None:
        batcher, answered = Batcher(Gate(open_=True), WIDE, costs=Linear(token_s=1e-5)), 0
        for _ in range(200):
            soon_s = perf_counter() + 0.001
            try:
                batcher.require_time(soon_s)
                await batcher.submit("a", 1, soon_s)
                answered += 1
            except OverloadedError:
                continue
        assert answered >= 5
        with pytest.raises(OverloadedError, match="after its deadline"):
            batcher.require_time(perf_counter() - 1e-6)
        await batcher.close()

    run(script())


def test_who_gives_up_waiting_makes_room_for_others() -> None:
    async def script() -> None:
        gate = Gate()
        batcher = Batcher(gate, WIDE, costs=Linear(token_s=0.1))
        running = asyncio.create_task(batcher.submit("running", 1))
        await gate.inside()
        waiting = [asyncio.create_task(batcher.submit("waiting", 10)) for _ in range(5)]
        await asyncio.sleep(0)
        assert batcher.queued_s() == pytest.approx(5, abs=0.2)
        for task in waiting[1:]:
            task.cancel()
        await asyncio.wait(waiting[1:])
        assert batcher.queued_s() == pytest.approx(1, abs=0.2)
        gate.opened.set()
        await asyncio.gather(running, waiting[0])
        assert batcher.queued_s() == 0
        await batcher.close()

    run(script())


def test_the_batcher_lets_nobody_join_who_makes_a_mate_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("hasten.batching.perf_counter", lambda: now[0])

    async def script() -> None:
        gate = Gate()
        batcher = Batcher(gate, WIDE, costs=Linear(start_s=0.1, token_s=0.001))
        running = asyncio.create_task(batcher.submit("running", 7))
        await gate.inside()
        two = [
            asyncio.create_task(batcher.submit("hurried", 10, 100.4)), asyncio.create_task(batcher.submit("mate", 10))
        ]  # fmt: skip
        await asyncio.sleep(0)
        now[0] = 100.28  # 0.12 s are left, and both together may take 0.132
        gate.opened.set()
        await asyncio.gather(running, *two)
        assert gate.batches == [["running"], ["hurried"], ["mate"]]
        await batcher.close()

    run(script())


def test_the_batcher_learns_from_every_inference() -> None:
    seen = list[tuple[int, int, float]]()

    class Noting(Linear):
        def observe(self, rows: int, tokens: int, seconds: float, /) -> None:
            seen.append((rows, tokens, seconds))

    async def script() -> None:
        gate = Gate()
        batcher = Batcher(gate, WIDE, costs=Noting(start_s=1.0))
        running = asyncio.create_task(batcher.submit("running", 7))
        await gate.inside()
        others = [asyncio.create_task(batcher.submit(text, len(text))) for text in ("a", "bb", "ccc")]
        await asyncio.sleep(0.05)
        gate.opened.set()
        await asyncio.gather(running, *others)
        await batcher.close()

    run(script())
    assert [shape[:2] for shape in seen] == [(1, 7), (3, 3)]
    assert seen[0][2] >= 0.05


def test_an_idle_batcher_now_and_then_tries_what_it_believes_to_be_late() -> None:
    """Else costs that were measured beside other work would refuse everything for ever."""
    seen = list[int]()

    class Wrong(Linear):
        def observe(self, rows: int, tokens: int, seconds: float, /) -> None:
            seen.append(tokens)

    async def script() -> None:
        gate = Gate()
        gate.opened.set()
        batcher = Batcher(gate, WIDE, costs=Wrong(token_s=0.1))
        outcomes = list[str]()
        for _ in range(2 * PROBE_EVERY):
            try:
                outcomes.append((await batcher.submit("x", 1, perf_counter() + 0.05)).row)
            except OverloadedError as error:
                outcomes.append(error.reason)
        assert outcomes == [*["late"] * (PROBE_EVERY - 1), "X"] * 2
        for _ in range(2 * PROBE_EVERY):  # what could not be in time by far is not tried
            with pytest.raises(OverloadedError, match="after its deadline"):
                await batcher.submit("x", 1, perf_counter() + 0.005)
        await batcher.close()

    run(script())
    assert seen == [1, 1]
