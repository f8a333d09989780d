"""Puts the table and the picture of a finished demo into the README, and keeps its report as a result.

    make demo && .venv/bin/python benchmarks/readme_demo.py hasten-demo/run

The picture is a screenshot of the report's first page, taken by Chromium (`chromium` must be on the PATH).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from provenance import HERE, save_result

ROOT = HERE.parent
COLUMNS = ("model", "parameters", "size", "accuracy (95 %)", "retained (95 %)", "p50", "p99", "speed-up", "verdict")


def row(variant: dict, chosen: str | None) -> str:
    """One line of the README's table."""
    accuracy, retention, latency = variant["accuracy"], variant["retention"], variant["latency_ms"]
    name = f"**{variant['name']}** (chosen)" if variant["name"] == chosen else variant["name"]
    cells = (
        name, f"{variant['parameters'] / 1e6:.1f} M", f"{variant['size_bytes'] / 1e6:.1f} MB",
        f"{accuracy['value']:.1%} ({accuracy['lower']:.1%} to {accuracy['upper']:.1%})",
        f"{retention['value']:.1%} ({retention['lower']:.1%} to {retention['upper']:.1%})",
        f"{latency['p50']:.2f} ms", f"{latency['p99']:.1f} ms", f"{variant['speedup']:.1f}×", variant["verdict"],
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(report: dict, origin: dict) -> str:
    """The table with what it was measured on."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [row(variant, report["chosen"]) for variant in report["variants"]]
    host, n = report["host"], report["variants"][0]
    lines += ["", (
        f"{n['accuracy']['n']} test rows, {n['latency_ms']['n']:,} single-text requests a variant, "
        f"{report['scenario']['threads']} threads; {host['cpu']} with {host['cores']:g} cores, "
        f"{', '.join(host['instructions'])}; commit {origin['commit'][:10]}, {origin['date']}."
    )]  # fmt: skip
    return "\n".join(lines)


def screenshot(page: Path, picture: Path) -> None:
    """The top of the page as a PNG."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
             f"--user-data-dir={profile}", "--window-size=1200,1780", f"--screenshot={picture}",
             page.resolve().as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip


def main(run: Path) -> None:
    """Reads the run's report and writes result, picture and README."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    for private in ("command", "model"):
        report.pop(private)  # they name folders of the machine
    origin = json.loads(save_result("demo", {"report": report}).read_text(encoding="utf-8"))
    screenshot(run / "report.html", ROOT / "docs" / "images" / "demo.png")
    readme = ROOT / "README.md"
    marks = r"(<!-- demo-table -->\n).*(\n<!-- /demo-table -->)"
    text = re.sub(
        marks, lambda m: f"{m[1]}\n{table(report, origin)}\n{m[2]}", readme.read_text("utf-8"), flags=re.DOTALL
    )
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
