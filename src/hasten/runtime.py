"""Text to logits, from a variant folder; the serving path, without torch.

`OnnxRuntime` runs a `model.onnx` with onnxruntime and `tokenizer.json` with tokenizers. `FakeRuntime` answers at once
and from the text alone: use it to test anything that needs a runtime. Non-goals: batching over requests
(`hasten.batching`), anything but single-sequence classification.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ArtifactError
from hasten.tokenization import MODEL_INPUTS, Encoding, TextEncoder, pad_token_id, padded
from hasten.variant import Variant

Logits = NDArray[np.float32]


class Runtime(Protocol):
    """Something that classifies texts."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names by id."""
        ...

    @property
    def compiles_shapes(self) -> bool:
        """Whether the first inference of each shape (rows, tokens) takes much longer than those after it."""
        ...

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenizes texts, truncated to the model's longest input."""
        ...

    def encode_plain(self, texts: Sequence[str]) -> list[Encoding] | None:
        """Tokenizes texts where that takes some microseconds in all; None where it may take longer."""
        ...

    def infer(self, encodings: Sequence[Encoding]) -> Logits:
        """Runs one padded batch.

        Args:
            encodings: At least one.

        Returns:
            Logits; shape [batch, labels], float32.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeRuntime:
    """A runtime without a model, for tests.

    Logits are drawn from a hash of each text's tokens (its bytes), so equal texts get equal answers, alone and in any
    batch.

    Attributes:
        labels: Label names.
        max_tokens: Longest input in bytes.
        compiles_shapes: As of `Runtime`.
    """

    labels: tuple[str, ...] = ("negative", "positive")
    max_tokens: int = 512
    compiles_shapes: bool = False

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """One token a byte."""
        rows = [list(text.encode()[: self.max_tokens]) for text in texts]
        return [Encoding(ids=ids, type_ids=[0] * len(ids)) for ids in rows]

    def encode_plain(self, texts: Sequence[str]) -> list[Encoding] | None:  # noqa: ARG002, as of `Runtime`
        """None: no text is taken to be plain."""
        return None

    def infer(self, encodings: Sequence[Encoding]) -> Logits:
        """Logits between -1 and 1; shape [batch, labels]."""
        seeds = [int.from_bytes(sha256(bytes(e.ids)).digest()[:8]) for e in encodings]
        rows = [np.random.default_rng(seed).uniform(-1, 1, len(self.labels)) for seed in seeds]
        return np.asarray(rows, dtype=np.float32)


class OnnxRuntime:
    """A variant's `model.onnx` in onnxruntime on the CPU.

    Where several inferences of several threads each shall run at the same time, each thread that calls has a session.
    """

    compiles_shapes = False

    def __init__(self, variant: Variant, *, threads: int, workers: int = 1, profile_prefix: Path | None = None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_prefix)
        path = variant.path / "model.onnx"
        self._open = partial(ort.InferenceSession, str(path), options, providers=["CPUExecutionProvider"])
        try:
            self._session = self._open()
        except Exception as error:  # onnxruntime's errors share no public base
            raise ArtifactError(f"{path}: onnxruntime cannot load it: {error}") from error
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._require_classifier(variant)
        # A session's threads serve all that call it, so several inferences of several threads need one each.
        self._apart = threading.local() if threads > 1 and workers > 1 else None
        self._encode = TextEncoder(variant)
        self._pad_id = pad_token_id(variant)
        self.labels = variant.labels

    def _require_classifier(self, variant: Variant) -> None:
        """Refuses a graph that does not go with the rest of its folder."""
        given = {node.name: node.shape for node in self._session.get_outputs()}
        width = given.get("logits", [0])[-1]  # a name where it is not fixed
        if set(self._inputs) - set(MODEL_INPUTS) or (isinstance(width, int) and width != len(variant.labels)):
            raise ArtifactError(
                f"{variant.path}: its graph takes {', '.join(self._inputs)} and gives {given}, where a classifier of "
                f"{len(variant.labels)} labels takes {', '.join(MODEL_INPUTS)} and gives logits; rebuild the folder"
            )

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenizes texts; see `Runtime.encode`."""
        return self._encode(texts)

    def encode_plain(self, texts: Sequence[str]) -> list[Encoding] | None:
        """Tokenizes plain texts; see `Runtime.encode_plain`."""
        return self._encode.plain(texts)

    def infer(self, encodings: Sequence[Encoding]) -> Logits:
        """Runs one padded batch; see `Runtime.infer`."""
        return np.asarray(self._mine().run(["logits"], self.feed(encodings))[0], dtype=np.float32)

    def _mine(self) -> Any:
        if self._apart is None:
            return self._session
        if not hasattr(self._apart, "session"):
            self._apart.session = self._open()
        return self._apart.session

    def feed(self, encodings: Sequence[Encoding]) -> dict[str, NDArray[np.int64]]:
        """The graph's inputs for one padded batch, by name; each of shape [batch, tokens]."""
        batch = padded(encodings, self._pad_id)
        return {name: batch[name] for name in self._inputs}

    def end_profiling(self) -> Path:
        """Stops onnxruntime's profiler and returns the path of its trace."""
        return Path(self._session.end_profiling())


def open_runtime(variant: Variant, *, threads: int = 1, workers: int = 1) -> Runtime:
    """Loads a variant for inference.

    Args:
        variant: An opened (and so hash-checked) folder.
        threads: Threads for one inference, at least 1. For a torch variant this sets the whole process's.
        workers: Inferences that shall run at the same time, each called from a thread of its own.

    Returns:
        The runtime that its format calls for.

    Raises:
        ArtifactError: The runtime cannot load the folder.
        MissingExtraError: The runtime that the format calls for is not installed.
    """
    if variant.manifest.format == "torch":
        from hasten.torch_runtime import TorchRuntime

        return TorchRuntime(variant, threads=threads)
    if variant.manifest.format == "openvino":
        from hasten.openvino_runtime import OpenVinoRuntime

        return OpenVinoRuntime(variant, threads=threads, workers=workers)
    return OnnxRuntime(variant, threads=threads, workers=workers)


def predict_logits(runtime: Runtime, texts: Sequence[str], *, batch: int = 1) -> Logits:
    """Logits of many texts, in their order.

    Args:
        runtime: What to run.
        texts: The texts; may be empty.
        batch: Most texts in one inference; texts of similar length share one.

    Returns:
        Logits; shape [texts, labels].
    """
    encodings = runtime.encode(texts)
    order = sorted(range(len(texts)), key=lambda row: len(encodings[row]))
    logits = np.zeros((len(texts), len(runtime.labels)), dtype=np.float32)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        logits[rows] = runtime.infer([encodings[row] for row in rows])
    return logits


def softmax(logits: Logits) -> Logits:
    """Probabilities from logits; shape [batch, labels], rows sum to 1."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
