"""Training on all GPUs of a machine: a process for each, started by torchrun, see `hasten.peers`.

What they do is written to a file, and they do it in `hasten.training_worker`; what they say comes as lines of JSON.
They end when the process that started them does. The tests run it with processes on a CPU.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hasten.errors import ArtifactError, DataError, HastenError, ParityError, UsageError
from hasten.files import write_atomically
from hasten.teaching import DistillOptions, Lesson
from hasten.torch_training import Progress
from hasten.variant import Variant

KINDS = {kind.__name__: kind for kind in (UsageError, ArtifactError, DataError, ParityError)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What `hasten.distillation.distill` was asked for; attributes as its arguments."""

    student: Variant
    out: Path
    options: DistillOptions
    name: str
    lesson: Lesson
    work: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A line from a process that trains.

    Attributes:
        done: Steps done.
        steps: Steps in all.
        error: What went wrong; None if nothing did.
        kind: The error's class, if it is one of `hasten.errors`.
    """

    done: int = 0
    steps: int = 0
    error: str | None = None
    kind: str | None = None


def devices() -> int:
    """How many processes to train with: one for each GPU, at least one."""
    import torch

    return max(1, torch.cuda.device_count())


def encoded(order: Order) -> bytes:
    """What `read_order` reads."""
    return msgspec.json.encode(order, enc_hook=_text)


def read_order(path: Path) -> Order:
    """What `train_together` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Order, dec_hook=_path)


def _text(value: Any) -> str:
    if not isinstance(value, Path):
        raise NotImplementedError(type(value))  # as msgspec asks of a hook that does not know a type
    return str(value)


def _path(kind: type, value: Any) -> Any:
    if kind is not Path:
        raise NotImplementedError(kind)  # likewise
    return Path(value)


def train_together(order: Order, count: int, progress: Progress | None) -> None:
    """Trains in several processes, of which the first writes the variant.

    Args:
        order: What to do.
        count: How many processes, at least 2.
        progress: Called with the steps done and the steps in all.

    Raises:
        HastenError: What one of them raised first, or how it ended.
    """
    order.work.mkdir(parents=True, exist_ok=True)
    path, log = (order.work / f"{order.name}.{suffix}" for suffix in ("order.json", "processes.log"))
    write_atomically(path, encoded(order))
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(count)]
    command = [sys.executable, "-m", *launcher, "-m", "hasten.training_worker", str(path)]
    wrong: Said | None = None
    with log.open("wb") as errors, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
    ) as processes:  # fmt: skip
        for line in processes.stdout or ():
            said = msgspec.json.decode(line, type=Said)
            wrong = wrong or (said if said.error else None)
            if progress is not None and said.steps:
                progress(said.done, said.steps)
    if wrong is not None:
        raise KINDS.get(wrong.kind or "", HastenError)(wrong.error)
    if processes.returncode:
        raise HastenError(f"training in {count} processes ended with status {processes.returncode}; {log} tells more")
    path.unlink()
    log.unlink()
