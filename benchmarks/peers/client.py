"""The driver's side of `worker.py`: a process that runs one row, seen as the runtime that hasten's checks expect."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from hasten.errors import MeasurementError
from hasten.openvino_runtime import cpu_settings
from hasten.runtime import Logits
from hasten.tokenization import Encoding, TextEncoder
from hasten.variant import Variant
from peers.environments import Row

WORKER = Path(__file__).parent / "worker.py"


class Client:
    """A process that runs one row, in the environment of its peer; also a `hasten.runtime.Runtime`."""

    compiles_shapes = False  # of no matter here: it serves nobody

    def __init__(self, row: Row, source: Variant, threads: int) -> None:
        self.row = row
        self.labels = source.labels
        self.encode = TextEncoder(source)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("PYTHONPATH", None)
        command = [str(row.python), str(WORKER), str(row.folder), str(threads), str(source.manifest.max_tokens)]
        if row.peer == "hasten":
            command.append(json.dumps(cpu_settings(threads=threads, precision=row.precision)))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Self:
        """Waits until the graph is loaded."""
        try:
            self.versions = self._answer()["versions"]
        except MeasurementError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.communicate()

    def classify(self, texts: Sequence[str], *, warmup: int = 0) -> dict[str, Any]:
        """Classifies texts one at a time: `samples_ms`, `tokens` and `logits`, one entry a text."""
        return self._ask({"texts": list(texts), "warmup": warmup})

    def infer(self, encodings: Sequence[Encoding]) -> Logits:
        """Runs one padded batch; shape [batch, labels]."""
        rows = [{"ids": encoding.ids, "type_ids": encoding.type_ids} for encoding in encodings]
        return np.asarray(self._ask({"rows": rows})["logits"], dtype=np.float32)

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        if self._process.stdin is None:
            raise MeasurementError(f"{self.row.name}: its process has no input")
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else b""
        if not line:
            raise MeasurementError(f"its process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MeasurementError(answer["error"])
        return answer
