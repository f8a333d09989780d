"""The process that runs one graph of a peer, in that peer's environment; commands and answers are lines of JSON.

    python worker.py FOLDER THREADS MAX_TOKENS [OPENVINO_SETTINGS]

It opens `model.onnx` with onnxruntime, or `openvino_model.xml` with OpenVINO, with the same number of threads.
OPENVINO_SETTINGS, an object of JSON, stands for what OpenVINO's guide to latency says where it is given. The first
answer says that the graph is loaded: `{"versions": ...}`. Commands, each with its answer:

- `{"texts": [...], "warmup": n}`: texts one at a time, the first n of them once more before, uncounted. Answers
  `samples_ms` (from text to logits, tokenizer included), `tokens` and `logits`, a row a text.
- `{"rows": [{"ids": [...], "type_ids": [...]}]}`: token ids as one batch, padded to the longest. Answers `logits`.

What goes wrong is answered as `{"error": ...}`. Needs numpy, tokenizers, and onnxruntime or openvino.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rows import installed, one_line
from tokenizers import Tokenizer

Run = Callable[[dict[str, Any]], Any]


def open_onnx(path: Path, threads: int) -> tuple[list[str], Run]:
    """Names of the inputs, and inputs to logits."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = [session.get_outputs()[0].name]
    return [node.name for node in session.get_inputs()], lambda feed: session.run(outputs, feed)[0]


def open_openvino(path: Path, threads: int, settings: dict[str, Any] | None) -> tuple[list[str], Run]:
    """Names of the inputs, and inputs to logits; set up as OpenVINO's guide to latency says, or as it is told."""
    import openvino as ov

    guide = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    compiled = ov.Core().compile_model(path, "CPU", guide if settings is None else settings)
    request = compiled.create_infer_request()

    def run(feed: dict[str, Any]) -> Any:
        return request.infer(feed, share_inputs=True, share_outputs=True)[0].copy()

    return [port.any_name for port in compiled.inputs], run


class Model:
    """One graph with the classifier's tokenizer."""

    def __init__(self, folder: Path, threads: int, max_tokens: int, settings: dict[str, Any] | None) -> None:
        is_onnx = (folder / "model.onnx").is_file()
        if is_onnx:
            self.inputs, self.run = open_onnx(folder / "model.onnx", threads)
        else:
            self.inputs, self.run = open_openvino(folder / "openvino_model.xml", threads, settings)
        self.libraries = ("onnxruntime" if is_onnx else "openvino", "tokenizers", "numpy")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.pad_id = int(config.get("pad_token_id") or 0)

    def logits(self, rows: list[tuple[list[int], list[int]]]) -> Any:
        """Logits of a batch of token and segment ids, padded on the right to the longest; shape [batch, labels]."""
        shape = (len(rows), max(len(ids) for ids, _ in rows))
        batch = {name: np.zeros(shape, dtype=np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
        batch["input_ids"][:] = self.pad_id
        for at, (ids, types) in enumerate(rows):
            batch["input_ids"][at, : len(ids)] = ids
            batch["token_type_ids"][at, : len(ids)] = types
            batch["attention_mask"][at, : len(ids)] = 1
        return self.run({name: batch[name] for name in self.inputs})

    def classify(self, text: str) -> tuple[Any, int]:
        """A text to its logits, and its length in tokens."""
        encoded = self.tokenizer.encode(text)
        return self.logits([(encoded.ids, encoded.type_ids)])[0], len(encoded.ids)

    def timed(self, texts: list[str], warmup: int) -> dict[str, Any]:
        """Classifies texts one at a time, and times each."""
        for text in texts[:warmup]:
            self.classify(text)
        answer: dict[str, Any] = {"samples_ms": [], "tokens": [], "logits": []}
        for text in texts:
            began = time.perf_counter()
            logits, tokens = self.classify(text)
            answer["samples_ms"].append((time.perf_counter() - began) * 1e3)
            answer["tokens"].append(tokens)
            answer["logits"].append(logits.tolist())
        return answer

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """The answer to a command."""
        if "rows" in command:
            return {"logits": self.logits([(row["ids"], row["type_ids"]) for row in command["rows"]]).tolist()}
        return self.timed(command["texts"], command.get("warmup", 0))


def main(folder: Path, threads: int, max_tokens: int, settings: dict[str, Any] | None) -> None:
    """Loads, then answers until the input ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer

    def attempt(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as problem:  # the driver reports it
            return {"error": one_line(problem)}

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    model = attempt(lambda: Model(folder, threads, max_tokens, settings))
    if isinstance(model, dict):
        say(model)
        return
    say({"versions": {name: found for name in model.libraries if (found := installed(name))}})
    for line in sys.stdin:
        say(attempt(partial(model.answer, json.loads(line))))


if __name__ == "__main__":
    told = json.loads(sys.argv[4]) if len(sys.argv) > 4 else None
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), told)
