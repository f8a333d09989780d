"""Kills a long command at random moments, starts it again, and compares the end with that of an undisturbed run.

    python benchmarks/kill_resume.py [optimize|distill] [--kills N]

A tiny BERT is trained on a synthetic task (as in the tests). `optimize` goes every step of the road; `distill` is one
long training: new texts, the teacher's answers, a stage that looks inside the teacher, and passes over the answers.
Times between a start and a kill are exponential, so every moment is as likely as any other.
Compared: the SHA-256 of every variant's weights, and of `optimize` the chosen variant, the parity and quantization
facts. Not compared: latencies, which are measured again only where a kill hit before they were kept.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import labelled_rows, make_trained, write_csv
from provenance import save_result

SEED = 7
TRAIN_ROWS, TEST_ROWS = 700, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is killed.

    Attributes:
        arguments: From the folder of model and data, and the folder to write, to the command's arguments.
        outcome: What must be the same after any number of kills, from the folder written.
        mean_s: Seconds between a start and a kill, on average.
    """

    arguments: Callable[[Path, Path], list[str]]
    outcome: Callable[[Path], dict[str, object]]
    mean_s: float


def road(folder: Path, out: Path) -> list[str]:
    """Every step, with a budget whose verdict does not hang on the noise of a latency."""
    return [
        "optimize", str(folder / "model"), "--train", str(folder / "train.csv"),
        "--test", str(folder / "test.csv"), "--speedup", "0.01", "--retain", "0.9", "--all", "--shapes", "1x32,2x32",
        "--samples", "30", "--epochs", "6", "--learning-rate", "0.002", "--out", str(out),
    ]  # fmt: skip


def training(folder: Path, out: Path) -> list[str]:
    """A student in two stages, over texts of which half are made."""
    return [
        "distill", str(folder / "model"), "--train", str(folder / "train.csv"), "--held-out",
        str(folder / "test.csv"), "--shape", "2x32", "--augment", "1", "--guide-epochs", "100", "--epochs", "300",
        "--learning-rate", "0.001", "--threads", "2", "--out", str(out),
    ]  # fmt: skip


def weights(variant: Path) -> dict[str, str]:
    """SHA-256 of a variant's weights, by file."""
    files: dict[str, str] = json.loads((variant / "variant.json").read_text(encoding="utf-8"))["files"]
    return {name: digest for name, digest in files.items() if name.startswith("model.")}


def after_road(out: Path) -> dict[str, object]:
    """Weights, choice, facts."""
    made = {path.parent.name: weights(path.parent) for path in sorted((out / "variants").glob("*/variant.json"))}
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {"chosen": report["chosen"], "steps": report["steps"], "weights": made}


JOBS = {
    "optimize": Job(arguments=road, outcome=after_road, mean_s=15.0),
    "distill": Job(arguments=training, outcome=lambda out: {"weights": weights(out)}, mean_s=30.0),
}


def interrupted(job: Job, folder: Path, out: Path, kills_left: int, generator: random.Random) -> int:
    """Runs to the end, killed with SIGKILL at random moments on the way; how many kills it took."""
    kills = 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", "hasten", *job.arguments(folder, out)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(generator.expovariate(1 / job.mean_s) if kills < kills_left else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        if process.returncode not in (0, 3):
            sys.exit(f"the run ended with status {process.returncode}")
        return kills


def main(what: Annotated[str, typer.Argument()] = "optimize", kills: int = 20) -> None:
    """Kills until there are enough, over as many whole runs as that takes."""
    if what not in JOBS:
        sys.exit(__doc__)
    generator, job = random.Random(SEED), JOBS[what]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = labelled_rows(TRAIN_ROWS + TEST_ROWS, seed=1)
        write_csv(folder / "train.csv", rows[:TRAIN_ROWS])
        write_csv(folder / "test.csv", rows[TRAIN_ROWS:])
        make_trained(folder, str(folder / "train.csv"))
        began = time.monotonic()
        interrupted(job, folder, folder / "undisturbed", 0, generator)
        undisturbed_s, expected = time.monotonic() - began, job.outcome(folder / "undisturbed")
        done, runs = 0, []
        while done < kills:
            out = folder / f"run-{len(runs)}"
            taken = interrupted(job, folder, out, kills - done, generator)
            done += taken
            leftovers = [p.name for p in folder.rglob("*") if p.name.endswith((".draft", ".old"))]
            runs.append({"kills": taken, "same": job.outcome(out) == expected, "leftovers": leftovers})
            print(f"run {len(runs)}: {runs[-1]}; {done} of {kills} kills", flush=True)
    same = all(run["same"] and not run["leftovers"] for run in runs)
    save_result(f"kill_{what}", {
        "kills": done, "runs": runs, "all_same": same, "seed": SEED, "undisturbed_s": round(undisturbed_s, 1),
        "mean_between_kills_s": job.mean_s, "expected": expected,
    })  # fmt: skip
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    typer.run(main)
