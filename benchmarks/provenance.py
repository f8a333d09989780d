"""Where a benchmark's figures come from: saved with every result."""

from __future__ import annotations

import datetime
import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from hasten.measurement import this_host

HERE = Path(__file__).parent


def save_result(name: str, result: dict[str, object]) -> Path:
    """Writes `results/<name>.json` with host, commit and date, and returns its path."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=HERE
    ).stdout.strip()  # fmt: skip
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    origin = {
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "host": asdict(this_host()),
    }
    path.write_text(json.dumps(origin | result, indent=2) + "\n", encoding="utf-8")
    print(path)
    return path
