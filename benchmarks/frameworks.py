"""What a request costs before anything is computed: ASGI servers and frameworks round the same route.

    python benchmarks/frameworks.py [--envs FOLDER] [--rounds 3] [--seconds 3] [--name frameworks]

Needs `wrk` (a Debian package). The server has core 0, `wrk` core 1, with one connection and then with eight. All are
asked in each round, in a random order, each in a process of its own; the figures are medians over rounds.
"""

from __future__ import annotations

import random
import re
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import typer

from overload import SERVER_CORE
from peers.environments import environment
from provenance import HERE, save_result

FOLDER = HERE / "frameworks"
UVICORN = ["-m", "uvicorn", "--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "error"]
GRANIAN = ["-m", "granian", "--interface", "asgi", "--loop", "uvloop", "--no-access-log", "--log-level", "error"]
SERVERS = {
    "uvicorn, no framework": [*UVICORN, "apps:bare"], "uvicorn, Starlette": [*UVICORN, "apps:starlette"],
    "uvicorn, FastAPI": [*UVICORN, "apps:fastapi"], "uvicorn, Litestar": [*UVICORN, "apps:litestar"],
    "Granian, no framework": [*GRANIAN, "apps:bare"], "Granian, Starlette": [*GRANIAN, "apps:starlette"],
}  # fmt: skip
CONNECTIONS = (1, 8)
ASK = 'wrk.method="POST"; wrk.body=\'{"inputs": "a fine film"}\'; wrk.headers["content-type"]="application/json"\n'


def asked(python: Path, arguments: list[str], script: Path, seconds: int) -> list[float]:
    """Requests a second of one server, for each number of connections."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["taskset", "-c", str(SERVER_CORE), str(python), *arguments, "--port", str(port)]
    server = subprocess.Popen(command, cwd=FOLDER, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        rates: list[float] = []
        for connections in CONNECTIONS:
            load = ["taskset", "-c", "1", "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script)]
            said = subprocess.run(
                [*load, f"http://127.0.0.1:{port}/predict"], check=True, capture_output=True, text=True
            ).stdout
            if "Non-2xx" in said or "Socket errors" in said:
                raise SystemExit(said)
            rates.append(float(re.findall(r"Requests/sec:\s+([\d.]+)", said)[0]))
        return rates
    finally:
        server.terminate()
        server.wait()


def main(envs: Path = Path("server-environments"), rounds: int = 3, seconds: int = 3, name: str = "frameworks") -> None:
    """Asks all, prints, saves."""
    envs = envs.absolute()
    envs.mkdir(parents=True, exist_ok=True)
    python = environment(FOLDER / "frameworks.txt", envs, envs / "log.txt")
    rates: dict[str, list[list[float]]] = {server: [] for server in SERVERS}
    with tempfile.TemporaryDirectory() as place:
        script = Path(place) / "ask.lua"
        script.write_text(ASK, encoding="utf-8")
        for number in range(rounds):
            for server in random.Random(number).sample(list(SERVERS), len(SERVERS)):
                rates[server].append(asked(python, SERVERS[server], script, seconds))
                print(number, server, rates[server][-1], flush=True)
    rows: list[dict[str, Any]] = [
        {"server": server, "rates": found, **{
            f"per_s_{connections}": round(statistics.median(one[at] for one in found))
            for at, connections in enumerate(CONNECTIONS)
        }} for server, found in rates.items()
    ]  # fmt: skip
    versions = (FOLDER / "frameworks.txt").read_text(encoding="utf-8").split()
    save_result(name, {"seconds": seconds, "rounds": rounds, "versions": versions, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
