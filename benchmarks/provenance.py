"""Where a benchmark's figures come from: saved with every result."""

from __future__ import annotations

import datetime
import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from hasten.measurement import this_host

HERE = Path(__file__).parent


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=HERE)
    return done.stdout.strip()


COMMIT = _git("rev-parse", "HEAD")  # of the code that was loaded, whatever is committed while it runs
CHANGED = bool(_git("status", "--porcelain", "--untracked-files=no", "--", "../src", ".", ":!results"))


def save_result(name: str, result: dict[str, object]) -> Path:
    """Writes `results/<name>.json` with host, commit and date, and returns its path."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    origin = {
        "commit": f"{COMMIT} with changes" if CHANGED else COMMIT,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "host": asdict(this_host()),
    }
    path.write_text(json.dumps(origin | result, indent=2) + "\n", encoding="utf-8")
    print(path)
    return path
