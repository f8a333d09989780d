"""Kills `hasten optimize` at random moments, starts it again, and compares the end with that of an undisturbed run.

    python benchmarks/kill_resume.py [KILLS]

A tiny BERT is trained on a synthetic task (as in the tests), so that a run has every step and takes about two minutes.
Times between a start and a kill are exponential, so every moment is as likely as any other.
Compared: the chosen variant, the SHA-256 of every variant's weights, the parity and quantization facts. Not compared:
latencies, which are measured again only where a kill hit before they were kept.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import labelled_rows, make_trained, write_csv
from provenance import save_result

SEED = 7
MEAN_S = 15.0
TRAIN_ROWS, TEST_ROWS = 700, 200


def command(folder: Path, out: Path) -> list[str]:
    """The run: every step, with a budget whose verdict does not hang on the noise of a latency."""
    return [
        sys.executable, "-m", "hasten", "optimize", str(folder / "model"), "--train", str(folder / "train.csv"),
        "--test", str(folder / "test.csv"), "--speedup", "0.01", "--retain", "0.9", "--all", "--shapes", "1x32,2x32",
        "--samples", "30", "--epochs", "6", "--learning-rate", "0.002", "--out", str(out),
    ]  # fmt: skip


def outcome(out: Path) -> dict[str, object]:
    """What must be the same after any number of kills."""
    weights = {}
    for path in sorted((out / "variants").glob("*/variant.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        weights[path.parent.name] = {n: h for n, h in manifest["files"].items() if n.startswith("model.")}
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {"chosen": report["chosen"], "steps": report["steps"], "weights": weights}


def interrupted(folder: Path, out: Path, kills_left: int, generator: random.Random) -> int:
    """Runs to the end, killed with SIGKILL at random moments on the way; how many kills it took."""
    kills = 0
    while True:
        process = subprocess.Popen(command(folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(generator.expovariate(1 / MEAN_S) if kills < kills_left else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        if process.returncode not in (0, 3):
            sys.exit(f"the run ended with status {process.returncode}")
        return kills


def main(wanted: int) -> None:
    """Kills until there are enough, over as many whole runs as that takes."""
    generator = random.Random(SEED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = labelled_rows(TRAIN_ROWS + TEST_ROWS, seed=1)
        write_csv(folder / "train.csv", rows[:TRAIN_ROWS])
        write_csv(folder / "test.csv", rows[TRAIN_ROWS:])
        make_trained(folder, str(folder / "train.csv"))
        began = time.monotonic()
        interrupted(folder, folder / "undisturbed", 0, generator)
        undisturbed_s, expected = time.monotonic() - began, outcome(folder / "undisturbed")
        kills, runs = 0, []
        while kills < wanted:
            out = folder / f"run-{len(runs)}"
            taken = interrupted(folder, out, wanted - kills, generator)
            kills += taken
            leftovers = [p.name for p in out.rglob("*") if p.name.endswith((".draft", ".old"))]
            runs.append({"kills": taken, "same": outcome(out) == expected, "leftovers": leftovers})
            print(f"run {len(runs)}: {runs[-1]}; {kills} of {wanted} kills", flush=True)
    same = all(run["same"] and not run["leftovers"] for run in runs)
    save_result("kill_resume", {
        "kills": kills, "runs": runs, "all_same": same, "seed": SEED, "undisturbed_s": round(undisturbed_s, 1),
        "mean_between_kills_s": MEAN_S, "expected": expected,
    })  # fmt: skip
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
