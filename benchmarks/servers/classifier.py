"""A variant folder as anyone would load it: `tokenizers` and onnxruntime, nothing of hasten; what every peer serves.

Runs in the peers' environments. The folder, the port and the threads of an inference come from the environment
variables MODEL, PORT and THREADS.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

PORT = int(os.environ.get("PORT", "0"))
MOST_TOKENS = 512


class Classifier:
    """Texts to labels with scores, best first."""

    def __init__(self) -> None:
        folder = Path(os.environ["MODEL"])
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.labels = [label for _, label in sorted(config["id2label"].items(), key=lambda pair: int(pair[0]))]
        self.tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(MOST_TOKENS)
        self.tokenizer.enable_padding(pad_id=config.get("pad_token_id") or 0)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["THREADS"])
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.names = [one.name for one in self.session.get_inputs()]

    def __call__(self, texts: list[str]) -> list[list[dict[str, Any]]]:
        """The labels of each text."""
        rows = self.tokenizer.encode_batch(texts)
        parts = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
        }
        (logits,) = self.session.run(None, {name: np.array(parts[name], np.int64) for name in self.names})
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return [
            [{"label": self.labels[i], "score": float(row[i])} for i in np.argsort(-row, kind="stable")]
            for row in shares
        ]
