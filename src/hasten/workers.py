"""Threads that do one job after another and tell an event loop of each.

`run_in_executor` does the same by way of two futures, a condition and three callbacks a job, all of it in Python on the
loop's thread, which is more than a request of a small model can spare.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers(Generic[Job, Result]):
    """A few threads and the jobs that wait for one of them; `start` and `close` are the event loop's to call."""

    def __init__(
        self,
        work: Callable[[Job], Result],
        done: Callable[[Job, Result], None],
        *,
        count: int,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Starts no thread yet.

        Args:
            work: Does a job, in one of the threads; must not raise.
            done: Is told of a job and what came of it, in the event loop that started it.
            count: Threads, at least 1.
            prepare: Called once in each thread before its first job; may raise where `open` asks for it.
        """
        self._work, self._done, self._count, self._prepare = work, done, count, prepare
        self._jobs = SimpleQueue[tuple[asyncio.AbstractEventLoop, Job] | None]()
        self._threads: list[threading.Thread] = []

    async def open(self) -> None:
        """Starts the threads and waits until each is prepared.

        Raises:
            Exception: What `prepare` raised; all threads have ended then.
        """
        loop, ready = asyncio.get_running_loop(), list[asyncio.Future[None]]()

        def tell(number: int, error: BaseException | None) -> None:
            loop.call_soon_threadsafe(_tell, ready[number], error)

        while len(self._threads) < self._count:
            ready.append(loop.create_future())
            self._spawn(partial(tell, len(ready) - 1))
        failed = [error for error in await asyncio.gather(*ready, return_exceptions=True) if error is not None]
        if failed:
            self.close()
            raise failed[0]

    def start(self, job: Job) -> None:
        """Has a job done as soon as a thread is free."""
        if len(self._threads) < self._count:
            self._spawn()
        self._jobs.put((asyncio.get_running_loop(), job))

    def close(self) -> None:
        """Ends the threads, once each has done its job."""
        for _ in self._threads:
            self._jobs.put(None)
        while self._threads:
            self._threads.pop().join()

    def _spawn(self, tell: Callable[[BaseException | None], object] = lambda _: None) -> None:
        name = f"hasten-worker-{len(self._threads)}"
        self._threads.append(threading.Thread(target=self._run, args=(tell,), name=name, daemon=True))
        self._threads[-1].start()

    def _run(self, tell: Callable[[BaseException | None], object]) -> None:
        try:
            if self._prepare is not None:
                self._prepare()
        except BaseException as error:
            tell(error)
            return
        tell(None)
        while (waiting := self._jobs.get()) is not None:
            loop, job = waiting
            result = self._work(job)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(self._done, job, result)
            del waiting, job, result  # kept, they would live until the next job comes


def _tell(ready: asyncio.Future[None], error: BaseException | None) -> None:
    if not ready.done():
        ready.set_result(None) if error is None else ready.set_exception(error)
