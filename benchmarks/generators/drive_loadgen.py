"""MLPerf's load generator, scenario Server: says when a request is due and how long it took; aiohttp sends it.

    python drive_loadgen.py URL TEXTS_JSON RATE SECONDS P99_MS

Prints a JSON object: what the generator counts as its result, in milliseconds, and how often each status was answered.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import mlperf_loadgen as lg

PERCENTILES = ("50.00", "90.00", "99.00")
MARK = ":::MLLOG "


class Sender:
    """Sends queries from a thread of its own."""

    def __init__(self, url: str, texts: list[str], p99_ms: float) -> None:
        self.url, self.statuses = f"{url}/predict", Counter[int]()
        self.bodies = [json.dumps({"inputs": text}).encode() for text in texts]
        self.headers = {"content-type": "application/json", "x-hasten-deadline-ms": f"{p99_ms:g}"}
        self.loop, self.tasks = asyncio.new_event_loop(), set[asyncio.Task[None]]()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.session = asyncio.run_coroutine_threadsafe(self.opened(), self.loop).result()

    async def opened(self) -> aiohttp.ClientSession:
        """The connections, made in their own loop."""
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=self.headers)

    def issue(self, queries: list[Any]) -> None:
        """Called by the load generator when queries are due."""
        self.loop.call_soon_threadsafe(self.begin, [(query.id, query.index) for query in queries])

    def begin(self, queries: list[tuple[int, int]]) -> None:
        """Begins to send, in the loop."""
        for number, row in queries:
            task = self.loop.create_task(self.ask(number, row))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def ask(self, number: int, row: int) -> None:
        """Sends one, and tells the load generator when it is answered."""
        try:
            async with self.session.post(self.url, data=self.bodies[row]) as reply:
                await reply.read()
                self.statuses[reply.status] += 1
        except (aiohttp.ClientError, OSError):
            self.statuses[0] += 1
        lg.QuerySamplesComplete([lg.QuerySampleResponse(number, 0, 0)])

    def close(self) -> None:
        """Closes the connections and ends the thread."""
        asyncio.run_coroutine_threadsafe(self.session.close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


def settings_of(rate: float, seconds: float, p99_ms: float) -> Any:
    """A Poisson load of a rate for some seconds."""
    settings = lg.TestSettings()
    settings.scenario, settings.mode = lg.TestScenario.Server, lg.TestMode.PerformanceOnly
    settings.server_target_qps = rate
    settings.server_target_latency_ns = int(p99_ms * 1e6)
    settings.min_duration_ms, settings.max_duration_ms = int(1e3 * seconds), int(1e3 * seconds)
    settings.min_query_count = 1
    return settings


def main() -> None:
    """Runs the load generator once and prints what it found."""
    url, texts, rate, seconds, p99_ms = sys.argv[1], json.loads(sys.argv[2]), *map(float, sys.argv[3:6])
    sender = Sender(url, texts, p99_ms)
    with tempfile.TemporaryDirectory() as folder:
        logs = lg.LogSettings()
        logs.log_output.outdir, logs.log_output.copy_summary_to_stdout = folder, False
        logs.enable_trace = False
        system = lg.ConstructSUT(sender.issue, lambda: None)
        library = lg.ConstructQSL(len(texts), len(texts), lambda _rows: None, lambda _rows: None)
        lg.StartTestWithLogSettings(system, library, settings_of(rate, seconds, p99_ms), logs)
        lg.DestroyQSL(library)
        lg.DestroySUT(system)
        lines = (Path(folder) / "mlperf_log_detail.txt").read_text(encoding="utf-8").splitlines()
    sender.close()
    found = {entry["key"]: entry["value"] for entry in (json.loads(line.removeprefix(MARK)) for line in lines)}
    percentiles = {f"p{float(q):g}_ms": found[f"result_{q}_percentile_latency_ns"] / 1e6 for q in PERCENTILES}
    print(json.dumps({**percentiles, "statuses": sender.statuses}))


if __name__ == "__main__":
    main()
