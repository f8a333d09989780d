from __future__ import annotations

import asyncio
import threading
import time

import pytest

from hasten.workers import Workers


def test_jobs_are_done_in_a_thread_and_told_in_the_loop_in_their_order() -> None:
    async def scenario() -> None:
        told = asyncio.Event()
        found: list[tuple[int, int, int]] = []

        def done(job: int, result: tuple[int, int]) -> None:
            found.append((job, *result))
            assert threading.current_thread() is threading.main_thread()
            if len(found) == 5:
                told.set()

        before = threading.active_count()
        workers = Workers(lambda job: (2 * job, threading.get_ident()), done, count=1)
        for job in range(5):
            workers.start(job)
        async with asyncio.timeout(5):
            await told.wait()
        assert [row[:2] for row in found] == [(job, 2 * job) for job in range(5)]
        assert len({row[2] for row in found}) == 1
        assert found[0][2] != threading.get_ident()
        workers.close()
        workers.close()
        assert threading.active_count() == before

    asyncio.run(scenario())


def test_each_thread_is_prepared_once() -> None:
    async def scenario() -> None:
        prepared: list[int] = []
        meeting, told = threading.Barrier(2), asyncio.Semaphore(0)
        workers = Workers(
            lambda _: meeting.wait(5), lambda *_: told.release(), count=2,
            prepare=lambda: prepared.append(threading.get_ident()),
        )  # fmt: skip
        async with asyncio.timeout(5):
            for job in range(6):
                workers.start(job)
            for _ in range(6):
                await told.acquire()
        assert len(set(prepared)) == len(prepared) == 2
        workers.close()

    asyncio.run(scenario())


def test_a_job_that_ends_after_its_loop_harms_nobody() -> None:
    opened, ended = threading.Event(), threading.Event()

    def work(_: int) -> None:
        assert opened.wait(5)
        ended.set()

    workers = Workers(work, lambda *_: None, count=1)

    async def start() -> None:
        workers.start(0)

    asyncio.run(start())
    opened.set()
    workers.close()  # would hang if the thread had died without a word, and a warning would be an error
    assert ended.is_set()


def test_a_result_is_not_kept_once_it_was_told() -> None:
    import weakref

    class Result:
        pass

    async def scenario() -> None:
        told: asyncio.Future[weakref.ref[Result]] = asyncio.get_running_loop().create_future()
        workers = Workers(lambda _: Result(), lambda _, result: told.set_result(weakref.ref(result)), count=1)
        workers.start(0)
        reference = await told
        for _ in range(100):
            if reference() is None:
                break
            await asyncio.sleep(0)
            time.sleep(0.001)
        assert reference() is None
        workers.close()

    asyncio.run(scenario())


def test_opened_threads_are_all_prepared_before_the_first_job_or_ended_where_that_failed() -> None:
    async def script(fails: bool) -> None:
        prepared, names = list[int](), {thread.name for thread in threading.enumerate()}

        def prepare() -> None:
            prepared.append(threading.get_ident())
            if fails and len(prepared) > 1:
                raise ValueError("cannot be prepared")

        workers = Workers[int, int](lambda job: job, lambda *_: None, count=3, prepare=prepare)
        if not fails:
            await workers.open()
            assert len(set(prepared)) == 3
            workers.close()
        else:
            with pytest.raises(ValueError, match="cannot be prepared"):
                await workers.open()
        assert {thread.name for thread in threading.enumerate()} == names

    asyncio.run(script(fails=False))
    asyncio.run(script(fails=True))
