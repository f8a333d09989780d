"""hasten's server against those that people use: the same graph, the same texts, the same core, the same loads.

    python benchmarks/against_servers.py VARIANT... --texts FILE [--envs FOLDER] [--only NAMES] [--rounds 3] [--name N]

VARIANT is a folder with `model.onnx` and `tokenizer.json`. The peers are plain FastAPI, LitServe, BentoML, Ray Serve
and MLServer, each in an environment of its own, made from `servers/<name>.txt`, with what `servers/serve_<name>.py`
holds: the same session for all, and token ids by `tokenizers`, where hasten's are the same by a shorter way. Those that
batch are run with batching and without.

A server has core 0, with all its processes, and one thread for an inference; the load generator has core 1. Offered are
open-loop Poisson loads of one text a request, at shares of the rate of the bare runtime, which is that of a loop on
core 0 without HTTP, for a second before each load, since the machine changes its speed; the server is idle then. A load
is offered again, up to twice, where the generator itself was late with one request in a hundred by over 10 ms. In each
round, in a random order, each server is started and offered every share, the smallest first; in the last one, multiples
of that rate too. Once it answers in time less than half of what it could, it is offered no larger one, since what is
left over would spoil that. What was refused counts as missed, and a rate holds where the median over rounds of the
share missed is at most 1 %: a machine that stalls now and then would else decide. Highest is the largest share up to
which all hold. What the generator adds is its latency against a server on core 0 that does nothing. What the queue
alone costs is told by a simulated one before the bare runtime: first come, first served, nothing refused and nothing
batched, in the times that the runtime took in the loop, while reading and replying cost nothing. Access logs are off.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from hasten.errors import HastenError
from hasten.load import ALLOWED_MISSES, Load, LoadOptions, offer
from hasten.variant import Variant, open_variant
from hasten.workload import read_texts
from overload import LOAD_CORE, SERVER_CORE, Bare, bare_seconds, row_of
from peers.environments import environment
from provenance import HERE, save_result

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MULTIPLES = (2.0, 5.0)
SHOWN = (0.2, 0.5, 0.8)
LOST = 0.5
JUST_NOW_S, MOST_DELAY_MS, MOST_STALLS = 1.0, 10.0, 2
START_S = 120.0
SIMULATED = 200_000
BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """How a server is started and asked.

    Attributes:
        name: As the table has it.
        peer: Name of its requirements and its script; empty for hasten.
        batch: Most texts of an inference.
        asked: What `inputs` holds.
    """

    name: str
    peer: str = ""
    batch: int = 1
    asked: str = "text"


SERVERS = (
    Server(name="hasten"),
    Server(name="FastAPI", peer="fastapi"),
    Server(name="LitServe", peer="litserve"),
    Server(name="LitServe, batches", peer="litserve", batch=BATCH),
    Server(name="BentoML", peer="bentoml"),
    Server(name="BentoML, batches", peer="bentoml", batch=BATCH, asked="list"),
    Server(name="Ray Serve", peer="ray_serve"),
    Server(name="Ray Serve, batches", peer="ray_serve", batch=BATCH),
    Server(name="MLServer", peer="mlserver", asked="tensor"),
    Server(name="MLServer, batches", peer="mlserver", batch=BATCH, asked="tensor"),
)


def command_of(server: Server, python: Path, folder: Path, port: int, p99_ms: float) -> list[str]:
    """What starts a server."""
    if not server.peer:
        options = ["--port", str(port), "--p99-ms", str(p99_ms), "--threads", "1", "--workers", "1"]
        return [sys.executable, "-m", "hasten", "serve", str(folder), *options]
    if server.peer == "bentoml":
        return [
            str(python),
            "-m",
            "bentoml",
            "serve",
            "serve_bentoml:Service",
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
        ]
    return [str(python), f"serve_{server.peer}.py"]


@contextmanager
def running(server: Server, python: Path, folder: Path, p99_ms: float, log: Path) -> Generator[str]:
    """The server on its core, once it answers.

    Yields:
        What `offer` takes: the address, which `/predict` is put behind.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    known = {"MODEL": str(folder), "PORT": str(port), "THREADS": "1", "BATCH": str(server.batch)}
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    os.sched_setaffinity(0, {SERVER_CORE})
    with log.open("ab") as stream:
        started = subprocess.Popen(
            command_of(server, python, folder, port, p99_ms), cwd=HERE / "servers" if server.peer else HERE.parent,
            env=os.environ | known | quiet | {"PYTHONPATH": "src" if not server.peer else ""}, stdout=stream,
            stderr=stream, start_new_session=True,
        )  # fmt: skip
    os.sched_setaffinity(0, {LOAD_CORE})
    address = f"http://127.0.0.1:{port}"
    if server.asked == "tensor":
        address += "/v2/models/classifier/infer?for="
    try:
        wait_for(server, started, address)
        yield address
    finally:
        stop(server, started, python)


def generator_p50_ms(trial: Trial) -> float:
    """What the generator itself adds, at a fifth of the bare rate."""
    os.sched_setaffinity(0, {SERVER_CORE})
    command = [sys.executable, "-m", "hasten.null_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        os.sched_setaffinity(0, {LOAD_CORE})
        try:
            address = f"http://127.0.0.1:{server.stdout.readline().strip() if server.stdout else ''}"
            return round(trial.load(SERVERS[0], address, trial.capacity / 5).percentile(50).value, 3)
        finally:
            server.terminate()


def wait_for(server: Server, started: subprocess.Popen[bytes], address: str) -> None:
    """Returns once a request is answered."""
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s:
        try:
            reply = httpx.post(f"{address}/predict", json={"inputs": inputs("a text", server)}, timeout=10)
            if reply.status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if started.poll() is not None:
            break
        time.sleep(0.2)
    raise HastenError(f"{server.name} did not start")


def stop(server: Server, started: subprocess.Popen[bytes], python: Path) -> None:
    """Ends all its processes."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(started.pid, sign)
            started.wait(10)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    if server.peer == "ray_serve":
        subprocess.run([python, "-m", "ray.scripts.scripts", "stop", "--force"], check=False, capture_output=True)


def inputs(text: str, server: Server) -> Any:
    """What a request's `inputs` holds: a text, a list of one, or a tensor of one by the Open Inference Protocol."""
    if server.asked == "tensor":
        return [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}]
    return [text] if server.asked == "list" else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What every server is asked.

    Attributes:
        texts: The texts.
        bare: The bare runtime.
        capacity: Its rate at first, texts a second.
        seconds: Of each load.
        p99_ms: Within which an answer is good.
        seed: Of the gaps and the texts.
    """

    texts: list[str]
    bare: Bare
    capacity: float
    seconds: float
    p99_ms: float
    seed: int

    def load(self, server: Server, address: str, rate: float, seed: int = 0) -> Load:
        """One load."""
        asked: Any = [inputs(text, server) for text in self.texts]
        options = LoadOptions(rate=rate, seconds=self.seconds, p99_ms=self.p99_ms, seed=self.seed + seed)
        return offer(address, asked, options)

    def rows(self, server: Server, address: str, shares: Sequence[float], round_: int) -> list[dict[str, Any]]:
        """What becomes of shares of the bare rate, in ascending order, until the server is lost."""
        rows = list[dict[str, Any]]()
        for share in shares:
            rows.append(self._row(server, address, share, round_))
            if rows[-1]["goodput_share"] < LOST * min(share, 1.0):
                break
        return rows

    def _row(self, server: Server, address: str, share: float, round_: int) -> dict[str, Any]:
        """What becomes of one share of what the machine is worth just now."""
        for stalls in range(MOST_STALLS + 1):
            capacity = self.bare.rate(JUST_NOW_S)
            row = row_of(self.load(server, address, share * capacity, round_), capacity)
            row |= {"share": share, "bare_texts_per_s": round(capacity, 1), "stalls": stalls}
            if row["send_delay_p99_ms"] <= MOST_DELAY_MS:
                break
        return row


def compared(
    variant: Variant, servers: list[Server], pythons: dict[str, Path], trial: Trial, rounds: int, log: Path
) -> list[dict[str, Any]]:
    """The rows of one variant."""
    loads: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
    failures: dict[str, str] = {}
    for number in range(rounds):
        multiples = MULTIPLES if number == rounds - 1 else ()
        for server in random.Random(number).sample(servers, len(servers)):
            try:
                with running(server, pythons[server.peer], variant.path, trial.p99_ms, log) as address:
                    trial.load(server, address, trial.capacity / 4)  # warms both up
                    found = trial.rows(server, address, (*SHARES, *multiples), number)
            except HastenError as error:
                failures[server.name] = str(error)
                continue
            loads[server.name] += found
            print(number, server.name, {row["share"]: missed(row) for row in found}, flush=True)
    return [
        {
            "server": name, "highest_share": highest(found), "shares": by_share(found), "loads": found,
            "failure": failures.get(name),
        }
        for name, found in loads.items()
    ]  # fmt: skip


def missed(row: dict[str, Any]) -> float:
    """Share of a load that was not answered in time."""
    return round(1 - (row["answered"] - row["late"]) / row["offered"], 4)


def by_share(loads: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over rounds, by share of the bare rate."""
    figures = ("p50_ms", "p99_ms", "goodput_share")
    return {
        f"{share:g}": {figure: round(statistics.median(row[figure] for row in rows), 3) for figure in figures}
        | {"missed": round(statistics.median(map(missed, rows)), 4)}
        for share in (*SHARES, *MULTIPLES)
        if (rows := [row for row in loads if row["share"] == share])
    }


def highest(loads: list[dict[str, Any]]) -> float | None:
    """The largest share of the bare rate up to which every load holds; None if not even the smallest does."""
    held = None
    for share, row in by_share(loads).items():
        if row["missed"] > ALLOWED_MISSES:
            break
        held = float(share)
    return held


def queue_alone(taken_s: Sequence[float], share: float, p99_ms: float) -> float:
    """Share of requests that a queue before the bare runtime answers late.

    Args:
        taken_s: Seconds that the runtime took for each of some texts.
        share: Of the rate that these come to.
        p99_ms: Within which an answer is good.

    Returns:
        0 to 1, by Lindley's recursion over Poisson arrivals.
    """
    generator = np.random.default_rng(0)
    served_s = generator.choice(np.asarray(taken_s), SIMULATED)
    gaps_s = generator.exponential(float(np.mean(taken_s)) / share, SIMULATED)
    free_s, late = 0.0, 0
    for gap, own in zip(gaps_s, served_s, strict=True):
        free_s = max(0.0, free_s - gap) + own
        late += free_s > p99_ms / 1000
    return late / SIMULATED


def main(
    folders: Annotated[list[Path], typer.Argument(help="Variant folders.")],
    texts: Annotated[str, typer.Option()],
    envs: Path = Path("server-environments"),
    only: Annotated[str | None, typer.Option(help="Names, separated by semicolons; all if not given.")] = None,
    rounds: int = 3,
    seconds: float = 5.0,
    p99_ms: Annotated[float, typer.Option()] = 50.0,
    name: str = "servers",
) -> None:
    """Makes the environments, then compares; prints, saves."""
    wanted = only.split(";") if only else [server.name for server in SERVERS]
    servers = [server for server in SERVERS if server.name in wanted]
    envs = envs.absolute()
    envs.mkdir(parents=True, exist_ok=True)
    log = envs / "log.txt"
    peers = {server.peer for server in servers if server.peer}
    pythons = {peer: environment(HERE / "servers" / f"{peer}.txt", envs, log) for peer in peers} | {
        "": Path(sys.executable)
    }
    asked, results = read_texts(texts), list[dict[str, Any]]()
    for folder in folders:
        variant = open_variant(folder.absolute())
        os.sched_setaffinity(0, {SERVER_CORE})
        taken_s = bare_seconds(variant, asked)
        capacity = len(taken_s) / sum(taken_s)
        print(f"{variant.name}: bare {capacity:.1f} texts/s", flush=True)
        trial = Trial(
            texts=asked, bare=Bare(variant, list(asked)), capacity=capacity, seconds=seconds, p99_ms=p99_ms, seed=1
        )
        results.append({
            "variant": variant.name, "architecture": variant.manifest.architecture,
            "parameters": variant.manifest.parameters.total, "bare_texts_per_s": round(capacity, 1),
            "bare_p50_ms": round(1e3 * float(np.median(taken_s)), 3),
            "generator_p50_ms": generator_p50_ms(trial),
            "queue_alone_missed": {f"{share:g}": round(queue_alone(taken_s, share, p99_ms), 4) for share in SHARES},
            "servers": compared(variant, servers, pythons, trial, rounds, log),
        })  # fmt: skip
    versions = {peer: (HERE / "servers" / f"{peer}.txt").read_text(encoding="utf-8").split() for peer in sorted(peers)}
    save_result(name, {
        "p99_ms": p99_ms, "seconds": seconds, "rounds": rounds, "peers": versions, "variants": results,
    })  # fmt: skip
    table = markdown(results)
    (HERE / "results" / f"{name}.md").write_text(table, encoding="utf-8")
    print(table)


def queue_holds(missed_by_share: dict[str, float]) -> str:
    """The largest share up to which a queue alone holds."""
    held = [share for share, missed in missed_by_share.items() if missed <= ALLOWED_MISSES]
    return held[-1] if held else "none"


def markdown(results: list[dict[str, Any]]) -> str:
    """The tables."""
    lines = list[str]()
    for result in results:
        lines += [
            f"## {result['variant']}",
            "",
            f"The bare runtime: {result['bare_texts_per_s']} texts/s, {result['bare_p50_ms']} ms at the median. "
            f"The generator adds {result['generator_p50_ms']} ms. A queue before the bare runtime, in which nothing "
            f"else costs anything, holds {queue_holds(result['queue_alone_missed'])} of that rate.",
            "",
        ]
        heads = [f"p50 / p99 at {share:.0%}" for share in SHOWN] + [f"goodput at {many:g}×" for many in MULTIPLES]
        lines += [f"| Server | Highest share of bare that holds | {' | '.join(heads)} | late at {MULTIPLES[-1]:g}× |"]
        lines += ["| :--- |" + " ---: |" * (len(heads) + 2)]
        lines += [row(server) for server in result["servers"]] + [""]
    return "\n".join(lines)


def row(server: dict[str, Any]) -> str:
    """One server's row."""
    shares, held = server["shares"], server["highest_share"]
    if not shares:
        return f"| {server['server']} | {server['failure']} |" + " |" * (len(SHOWN) + len(MULTIPLES) + 1)
    found = [shares.get(f"{share:g}") for share in (*SHOWN, *MULTIPLES)]
    calm = ["–" if one is None else f"{one['p50_ms']:.1f} / {one['p99_ms']:.1f}" for one in found[: len(SHOWN)]]
    goodputs = ["–" if flood is None else f"{flood['goodput_share']:.0%}" for flood in found[len(SHOWN) :]]
    flooded = [load for load in server["loads"] if load["share"] == MULTIPLES[-1] and load["answered"]]
    late = f"{flooded[-1]['late'] / flooded[-1]['answered']:.1%}" if flooded else "–"
    return f"| {server['server']} | {'none' if held is None else held} | {' | '.join([*calm, *goodputs, late])} |"


if __name__ == "__main__":
    typer.run(main)
