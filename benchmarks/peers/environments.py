"""The peers, each with an environment of its own that is made once, and the rows that each builds in it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hasten.errors import HastenError
from hasten.files import file_sha256, write_atomically
from hasten.variant import Precision
from peers.rows import is_whole, without_folders

HERE = Path(__file__).parent
PEERS = ("onnxruntime", "optimum", "openvino", "olive", "sentence_transformers")
MARKER = "installed.txt"
WEIGHTS = ("model.onnx", "openvino_model.xml", "openvino_model.bin")
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
    "OLIVE_DISABLE_TELEMETRY": "1",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One graph of the comparison, or the reason why there is none.

    Attributes:
        name: The row's name, which ends in the graph's precision and, where hasten runs it in bfloat16, in `bf16`.
        peer: Whose it is: `hasten` or one of `PEERS`.
        how: How it was made, in words.
        folder: Where it stands.
        python: The interpreter that runs it.
        versions: Versions of the libraries that made it.
        error: Why it could not be made; None if it was.
    """

    name: str
    peer: str
    how: str
    folder: Path
    python: Path
    versions: dict[str, str] = field(default_factory=dict[str, str])
    error: str | None = None

    @property
    def precision(self) -> Precision:
        """What it is called. A peer's graph is run as its runtime pleases, which can be in bfloat16."""
        if self.name.endswith("-bf16"):
            return "int8+bf16" if self.weights == "int8" else "bf16"
        return self.weights

    @property
    def weights(self) -> Precision:
        """`fp32` or `int8`: what the graph holds, by which rows of hasten and of peers are compared."""
        return "fp32" if self.name.endswith(("fp32", "openvino-bf16")) else "int8"

    @property
    def files(self) -> list[Path]:
        """The files of the graph."""
        return [self.folder / name for name in WEIGHTS if (self.folder / name).is_file()]

    @property
    def size_bytes(self) -> int:
        """Size of the graph with its weights."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def digest(self) -> str:
        """Identity (hex) of the graph."""
        return "".join(file_sha256(path) for path in self.files)


def built(peer: str, checkpoint: Path, calibration: Path, envs: Path, out: Path) -> list[Row]:
    """A peer's rows: those that stand are kept, the others are built.

    Args:
        peer: One of `PEERS`.
        checkpoint: Folder of the classifier.
        calibration: Texts to calibrate on, as JSON lines.
        envs: Folder of the environments.
        out: Folder for rows and logs; rows of another classifier must not stand there.

    Returns:
        The rows, with those that failed; a single failed one if the peer as a whole could not be had.
    """
    rows = out / "rows" / f"{peer}-{_recipe(peer)}"
    rows.mkdir(parents=True, exist_ok=True)
    log = out / "logs" / f"{peer}.txt"
    log.parent.mkdir(exist_ok=True)
    try:
        python = environment(HERE / f"{peer}.txt", envs, log)
        _run([python, HERE / f"build_{peer}.py", checkpoint, calibration, rows], log)
    except HastenError as error:
        failed = Row(name=peer, peer=peer, how="", folder=rows, python=Path(), error=str(error))
        standing = [_row(peer, path.parent, envs) for path in sorted(rows.glob("*/row.json"))]
        return [*(row for row in standing if is_whole(row.folder)), failed]
    return [_row(peer, path.parent, envs) for path in sorted(rows.glob("*/row.json"))]


def _recipe(peer: str) -> str:
    """Identity (hex) of how a peer's rows are made: its versions and its script."""
    files = (HERE / f"{peer}.txt", HERE / f"build_{peer}.py")
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:8]


def _row(peer: str, folder: Path, envs: Path) -> Row:
    about = json.loads((folder / "row.json").read_text(encoding="utf-8"))
    return Row(name=folder.name, peer=peer, folder=folder, python=_python(peer, envs), **about)


def environment(requirements: Path, envs: Path, log: Path) -> Path:
    """The interpreter of an environment, which is made if it does not stand with the same requirements.

    Args:
        requirements: What the installer gets; the file's name is the environment's.
        envs: Folder of the environments.
        log: Gets what the installer says.

    Returns:
        Path of the interpreter.

    Raises:
        HastenError: It cannot be installed.
    """
    peer = requirements.stem
    place = envs / peer
    marker = place / MARKER
    if not (marker.is_file() and marker.read_bytes() == requirements.read_bytes()):
        _run([sys.executable, "-m", "venv", "--clear", place], log)
        _run([_python(peer, envs), "-m", "pip", "install", "--quiet", "-r", requirements], log)
        write_atomically(marker, requirements.read_bytes())
    return _python(peer, envs)


def _python(peer: str, envs: Path) -> Path:
    return (envs / peer / "bin" / "python").absolute()


def _run(command: Sequence[str | Path], log: Path) -> None:
    """Runs a command and adds what it says to a log.

    Raises:
        HastenError: It failed; with the last line it said.
    """
    with log.open("ab") as stream:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | OFFLINE
        line = [str(part) for part in command]
        done = subprocess.run(line, check=False, stdout=stream, stderr=stream, env=environment)
    if done.returncode:
        said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise HastenError(without_folders(f"exit status {done.returncode}: {said[-1] if said else 'no output'}"))
