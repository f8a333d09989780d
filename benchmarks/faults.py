"""What faults do to a server under load: wrong answers, lost ones, late ones, and how long until all is as before.

    python benchmarks/faults.py VARIANT OTHER_VARIANT TEXTS [--share 0.5] [--p99-ms 50] [--name faults]

The server has core 0 and one thread, everything else core 1. Offered is an open-loop Poisson load at a share of the
rate that the bare runtime reaches on core 0, for some seconds; after three of them a fault happens: the server is
stopped for two seconds, told to reload a damaged folder or another variant, meets a thousand clients that ask and leave
at once, or a second load generator at four times the rate that is killed; of a server of two processes, one is killed.
Every answer is compared with that of the
runtime itself. Recovered is when, after the fault, the last request was due that was not answered rightly and in time.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import msgspec
import numpy as np
import psutil
import typer

from hasten.load import LoadOptions, due_times
from hasten.runtime import open_runtime
from hasten.variant import Variant, open_variant
from hasten.workload import read_texts
from overload import LOAD_CORE, SERVER_CORE, bare_seconds, started
from provenance import save_result

FAULT_S, STOPPED_S, LOAD_S = 3.0, 2.0, 10.0
LEAVING = 1000
SETTLE_S = 3.0  # until the second process serves too
FLOOD = """
import sys
from hasten.load import LoadOptions, offer
offer(sys.argv[1], ["a film that is neither here nor there"], LoadOptions(rate=float(sys.argv[2]), seconds=60))
"""
REFUSED = (429, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request.

    Attributes:
        due_s: When it was due, from the start of the load.
        ms: Until it was answered, from when it was due.
        status: Its status; 0 if there was none.
        right: Whether the answer is that of the runtime.
    """

    due_s: float
    ms: float
    status: int
    right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A server and what it should answer.

    Attributes:
        process: Its process.
        url: Its address.
        link: What it serves, a link to a folder.
        texts: Texts to ask.
        answers: By digest of the artifact, the best label of each text.
        rate: Requests a second.
        p99_ms: Deadline of each.
    """

    process: subprocess.Popen[bytes]
    url: str
    link: Path
    texts: list[str]
    answers: dict[str, list[str]]
    rate: float
    p99_ms: float

    def point(self, folder: Path) -> None:
        """Puts another folder in place and has it reloaded."""
        fresh = self.link.with_name("fresh")
        fresh.symlink_to(folder)
        fresh.replace(self.link)
        self.process.send_signal(signal.SIGHUP)


async def loaded(site: Site, fault: Callable[[], Awaitable[None]]) -> list[Outcome]:
    """The load, with a fault in it."""
    options = LoadOptions(rate=site.rate, seconds=LOAD_S, p99_ms=site.p99_ms)
    due = due_times(options)
    rows = np.random.default_rng(1).integers(0, len(site.texts), len(due))
    headers = {"content-type": "application/json", "x-hasten-deadline-ms": f"{site.p99_ms:g}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def ask(row: int, due_s: float) -> Outcome:
            await asyncio.sleep(begun_s + due_s - time.perf_counter())
            status, right = 0, False
            try:
                body = msgspec.json.encode({"inputs": site.texts[row]})
                async with session.post(f"{site.url}/predict", data=body) as reply:
                    content, status = await reply.read(), reply.status
                    if status == 200:
                        best = msgspec.json.decode(content)[0]["label"]
                        right = best == site.answers[reply.headers["x-hasten-artifact"]][row]
            except (aiohttp.ClientError, OSError):
                pass
            ms = 1e3 * (time.perf_counter() - begun_s - due_s)
            return Outcome(due_s=due_s, ms=ms, status=status, right=right)

        async def strike() -> None:
            await asyncio.sleep(begun_s + FAULT_S - time.perf_counter())
            await fault()

        begun_s = time.perf_counter() + 0.1
        asked = [ask(int(row), float(at)) for row, at in zip(rows, due, strict=True)]
        _, *outcomes = await asyncio.gather(strike(), *asked)
    return outcomes


def summary(name: str, outcomes: list[Outcome], p99_ms: float) -> dict[str, Any]:
    """One fault in figures."""
    answered = [one for one in outcomes if one.status == 200]
    bad = [one.due_s for one in outcomes if one.due_s >= FAULT_S and not (one.right and one.ms <= p99_ms)]
    return {
        "fault": name, "offered": len(outcomes), "answered": len(answered),
        "wrong": sum(not one.right for one in answered),
        "late": sum(one.ms > p99_ms for one in answered),
        "refused": sum(one.status in REFUSED for one in outcomes),
        "lost": sum(one.status not in (200, *REFUSED) for one in outcomes),
        "p99_ms": round(float(np.percentile([one.ms for one in answered], 99)), 1),
        "recovered_s": round(max(bad) - FAULT_S, 2) if bad else 0.0,
    }  # fmt: skip


async def leave(url: str) -> None:
    """Asks and leaves at once."""
    host, port = url.removeprefix("http://").split(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b'POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 20\r\n\r\n{"inputs": "a film"}')
        await writer.drain()
        writer.close()
    except OSError:
        pass


def faults(site: Site, other: Path, damaged: Path) -> dict[str, Callable[[], Awaitable[None]]]:
    """What happens, by name."""

    async def nothing() -> None: ...

    async def stopped() -> None:
        site.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(STOPPED_S)
        site.process.send_signal(signal.SIGCONT)

    async def reload_damaged() -> None:
        site.point(damaged)

    async def reload_other() -> None:
        site.point(other)

    async def clients_leave() -> None:
        await asyncio.gather(*(leave(site.url) for _ in range(LEAVING)))

    async def generator_dies() -> None:
        command = [sys.executable, "-c", FLOOD, site.url, str(4 * site.rate)]
        generator = await asyncio.create_subprocess_exec(*command, stdout=DEVNULL, stderr=DEVNULL)
        await asyncio.sleep(4)  # of which it takes about one to start
        generator.kill()
        await generator.wait()

    return {
        "none": nothing, "stopped for 2 s": stopped, "1,000 clients leave": clients_leave,
        "a generator at four times the rate, killed": generator_dies, "reload of a damaged folder": reload_damaged,
        "reload of another variant": reload_other,
    }  # fmt: skip


def fault_of_two(site: Site) -> dict[str, Callable[[], Awaitable[None]]]:
    """What happens to a server of two processes, by name."""

    async def nothing() -> None: ...

    async def killed() -> None:
        serving = [
            one for one in psutil.Process(site.process.pid).children() if "spawn_main" in " ".join(one.cmdline())
        ]
        serving[0].kill()

    return {"none, two processes": nothing, "one of two processes is killed": killed}


def best_labels(variant: Variant, texts: list[str]) -> list[str]:
    """What the runtime answers, each text alone."""
    runtime = open_runtime(variant)
    return [runtime.labels[int(runtime.infer(runtime.encode([text]))[0].argmax())] for text in texts]


def main(
    folder: Path, other: Path, texts: str, share: Annotated[float, typer.Option()] = 0.5,
    p99_ms: Annotated[float, typer.Option()] = 50.0, name: str = "faults",
) -> None:  # fmt: skip
    """Starts a server, lets each fault happen to it, prints, saves."""
    os.sched_setaffinity(0, {SERVER_CORE})
    variants, asked = [open_variant(folder.absolute()), open_variant(other.absolute())], read_texts(texts)
    answers = {variant.digest: best_labels(variant, asked) for variant in variants}
    taken_s = bare_seconds(variants[0], asked)
    capacity = len(taken_s) / sum(taken_s)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        link, damaged = Path(place) / "served", Path(place) / "damaged"
        shutil.copytree(variants[0].path, damaged)
        with (damaged / "model.onnx").open("r+b") as graph:
            graph.seek(1000)
            graph.write(b"damage")
        for processes, happen in (
            (1, lambda site: faults(site, variants[1].path, damaged)), (2, fault_of_two),
        ):  # fmt: skip
            link.unlink(missing_ok=True)
            link.symlink_to(variants[0].path)
            os.sched_setaffinity(0, {SERVER_CORE})
            process, url = started(link, p99_ms, "--processes", str(processes))
            os.sched_setaffinity(0, {LOAD_CORE})
            site = Site(
                process=process, url=url, link=link, texts=asked, answers=answers, rate=share * capacity, p99_ms=p99_ms
            )
            try:
                time.sleep(SETTLE_S)
                for fault, happens in happen(site).items():
                    rows.append(summary(fault, asyncio.run(loaded(site, happens)), p99_ms))
                    print(rows[-1], flush=True)
                    time.sleep(1)
            finally:
                process.terminate()
                process.wait()
    save_result(name, {
        "variant": variants[0].name, "p99_ms": p99_ms, "seconds": LOAD_S, "bare_texts_per_s": round(capacity, 1),
        "rate": round(share * capacity, 1), "rows": rows,
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
