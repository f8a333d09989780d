"""The command line's reference page is generated; it must be that of the command line as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"


def test_the_reference_is_that_of_the_command_line(tmp_path: Path) -> None:
    output = tmp_path / "cli.md"
    words = ["-m", "typer", "hasten.cli", "utils", "docs", "--name", "hasten", "--title", "Command line"]
    subprocess.run([sys.executable, *words, "--output", str(output)], check=True, capture_output=True, timeout=60)
    assert PAGE.read_text(encoding="utf-8") == output.read_text(encoding="utf-8"), (
        "regenerate it: typer hasten.cli utils docs --name hasten --title 'Command line' --output docs/reference/cli.md"
    )
