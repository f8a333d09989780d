"""Whether other load generators say what `hasten bench` says of the same server.

    python benchmarks/generators.py VARIANT TEXTS [--envs FOLDER] [--rounds 5] [--seconds 8] [--name generators]

MLPerf's load generator (mlcommons-loadgen, scenario Server) is an open-loop Poisson load as `hasten bench` is; both
count from when a request was due. Each offers shares of the bare runtime's rate, which is measured before every pair of
loads, since the machine's own speed comes and goes; the two of a pair follow each other in a random order, and their
ratio is taken pair by pair. Shown are medians over rounds, and the ratio's 95 % interval by SciPy's bootstrap.
`wrk` (a Debian package) asks in a closed loop, over 1, 8 and 64 connections: what comes out is throughput, set beside
that of the bare runtime before and after. The server has core 0 and one thread, the generator core 1.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy import stats

from hasten.load import LoadOptions, offer
from hasten.variant import open_variant
from hasten.workload import read_texts
from overload import BARE_S, LOAD_CORE, SERVER_CORE, Bare, started
from peers.environments import environment
from provenance import HERE, save_result

FOLDER = HERE / "generators"
SHARES = (0.2, 0.4, 0.6)
CONNECTIONS = (1, 8, 64)
PERCENTILES = (50, 90, 99)
WRK = """
local at = 0
local bodies = {%s}
request = function()
  at = at %% #bodies + 1
  return wrk.format("POST", "/predict", {["content-type"] = "application/json"}, bodies[at])
end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How it is asked.

    Attributes:
        rounds: How often each.
        seconds: How long each; wrk half as long.
        p99_ms: Deadline of each request in the open loop.
    """

    rounds: int
    seconds: float
    p99_ms: float


def by_hasten(url: str, texts: list[str], options: LoadOptions) -> dict[str, float]:
    """Percentiles by `hasten bench`, in milliseconds, and the share that was refused."""
    load = offer(url, texts, options)
    found = {f"p{q}_ms": load.percentile(q).value for q in PERCENTILES}
    return {**found, "refused": len(load.refused_ms) / load.offered}


def by_loadgen(python: Path, url: str, texts: list[str], options: LoadOptions) -> dict[str, float]:
    """The same by MLPerf's load generator."""
    numbers = map(str, (options.rate, options.seconds, options.p99_ms))
    command = [str(python), str(FOLDER / "drive_loadgen.py"), url, json.dumps(texts), *numbers]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    statuses = found.pop("statuses")
    return {**found, "refused": 1 - statuses.get("200", 0) / sum(statuses.values())}


def by_wrk(url: str, script: Path, connections: int, seconds: float) -> float:
    """Answers a second in a closed loop."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(script), url]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(said)
    return float(re.findall(r"Requests/sec:\s+([\d.]+)", said)[0])


def agreement(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds of each generator, and of loadgen's over hasten's, with that ratio's interval."""
    middle = {
        generator: {
            figure: statistics.median(one[generator][figure] for one in rounds) for figure in rounds[0][generator]
        }
        for generator in rounds[0]
    }
    ratios = dict[str, Any]()
    for q in PERCENTILES:
        own = np.array([one["loadgen"][f"p{q}_ms"] / one["hasten bench"][f"p{q}_ms"] for one in rounds])
        found = stats.bootstrap((own,), np.median, method="percentile", rng=0).confidence_interval
        ratios |= {f"p{q}_ratio": round(float(np.median(own)), 3),
                   f"p{q}_ratio_interval": [round(float(found.low), 3), round(float(found.high), 3)]}  # fmt: skip
    rounded = {name: {figure: round(value, 3) for figure, value in row.items()} for name, row in middle.items()}
    return {**rounded, **ratios}


def open_loop(url: str, texts: list[str], bare: Bare, python: Path, options: Options) -> list[dict[str, Any]]:
    """What both open-loop generators say, by share of the bare rate."""
    offer(url, texts, LoadOptions(rate=bare.rate() / 2, seconds=2, p99_ms=options.p99_ms))  # warms up
    found: dict[float, list[dict[str, dict[str, float]]]] = {share: [] for share in SHARES}
    for number in range(options.rounds):
        for share, rows in found.items():
            load = LoadOptions(rate=share * bare.rate(), seconds=options.seconds, p99_ms=options.p99_ms, seed=number)
            ways: dict[str, Callable[[], dict[str, float]]] = {
                "hasten bench": partial(by_hasten, url, texts, load),
                "loadgen": partial(by_loadgen, python, url, texts, load),
            }
            rows.append({way: ways[way]() for way in random.Random(number).sample(list(ways), len(ways))})
            print(number, share, rows[-1], flush=True)
    return [{"share": share, **agreement(rows)} for share, rows in found.items()]


def closed_loop(url: str, texts: list[str], bare: Bare, options: Options) -> list[dict[str, Any]]:
    """Answers a second by wrk, by number of connections, and of what the bare runtime reaches."""
    found: dict[int, list[tuple[float, float]]] = {connections: [] for connections in CONNECTIONS}
    with tempfile.TemporaryDirectory() as place:
        script = Path(place) / "ask.lua"
        bodies = ", ".join(json.dumps(json.dumps({"inputs": text})) for text in texts)
        script.write_text(WRK % bodies, encoding="utf-8")
        for _ in range(options.rounds):
            for connections, rates in found.items():
                before, rate = bare.rate(), by_wrk(url, script, connections, options.seconds / 2)
                rates.append((rate, rate / ((before + bare.rate()) / 2)))
                print(connections, rates[-1], flush=True)
    return [
        {"connections": connections, "per_s": round(statistics.median(rate for rate, _ in rates), 1),
         "of_bare": round(statistics.median(share for _, share in rates), 3)}
        for connections, rates in found.items()
    ]  # fmt: skip


def main(
    folder: Path, texts: str, envs: Path = Path("generator-environments"), rounds: int = 5, seconds: float = 8.0,
    p99_ms: Annotated[float, typer.Option()] = 50.0, name: str = "generators",
) -> None:  # fmt: skip
    """Asks by each generator, prints, saves."""
    envs, options = envs.absolute(), Options(rounds=rounds, seconds=seconds, p99_ms=p99_ms)
    envs.mkdir(parents=True, exist_ok=True)
    python = environment(FOLDER / "loadgen.txt", envs, envs / "log.txt")
    os.sched_setaffinity(0, {SERVER_CORE})
    variant, asked = open_variant(folder), read_texts(texts)
    bare = Bare(variant, asked)
    capacity = bare.rate(BARE_S)
    print(f"bare: {capacity:.1f} texts/s", flush=True)
    with on_its_core(folder, p99_ms) as url:
        opened = open_loop(url, asked, bare, python, options)
    with on_its_core(folder, None) as url:
        closed = closed_loop(url, asked, bare, options)
    save_result(name, {
        "variant": variant.name, "p99_ms": p99_ms, "seconds": seconds, "rounds": rounds,
        "bare_texts_per_s": round(capacity, 1),
        "loadgen": (FOLDER / "loadgen.txt").read_text(encoding="utf-8").splitlines()[1],
        "open_loop": opened, "closed_loop": closed,
    })  # fmt: skip


@contextmanager
def on_its_core(folder: Path, p99_ms: float | None) -> Generator[str]:
    """A server on its core, and this process on the other."""
    os.sched_setaffinity(0, {SERVER_CORE})
    server, url = started(folder, p99_ms)
    os.sched_setaffinity(0, {LOAD_CORE})
    try:
        yield url
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    typer.run(main)
