"""Where the time goes: milliseconds a text by group of operators, from one run under a profiler.

The groups are `hasten.measurement.GROUPS`. In PyTorch a hook on every module charges each group with its own time,
less that of the modules inside; in onnxruntime its profiler names each node, and the export named each node after its
module. Profiling slows the run down, so read the shares, and take the latencies from an ordinary run.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from hasten.measurement import GROUPS
from hasten.openvino_runtime import OpenVinoRuntime
from hasten.runtime import OnnxRuntime, Runtime
from hasten.torch_runtime import TorchRuntime
from hasten.variant import Variant

NORMALISATION = re.compile(r"(layer_?norm|\bnorm|_norm|LayerNorm)", re.IGNORECASE)
PLACES = (
    ("head", re.compile(r"^(classifier|pre_classifier|pooler|head|logits|.*\.pooler)", re.IGNORECASE)),
    ("embeddings", re.compile(r"embeddings?")),
    ("attention", re.compile(r"attention|attn|rel_embed|position_bias")),
    ("feed-forward", re.compile(r"intermediate|ffn|mlp|lin[12]|\.output\b|feed_forward|full_layer")),
)
BY_OPERATOR = {
    "LayerNormalization": "normalisation",
    "SkipLayerNormalization": "normalisation",
    "EmbedLayerNormalization": "embeddings",
    "MVN": "normalisation",  # OpenVINO's, and the gain and shift behind it
    "MulAdd": "normalisation",
    "BiasGelu": "feed-forward",
    "FastGelu": "feed-forward",
    "Gelu": "feed-forward",
    "Attention": "attention",
    "MultiHeadAttention": "attention",
    "Softmax": "attention",
    "FusedMatMul": "attention",
    "Gather": "embeddings",
}


def group_of(path: str, operator: str = "") -> str:
    """The group of a module's path or a node's name.

    Args:
        path: Such as `bert.encoder.layer.0.attention.self`.
        operator: The node's operator, which decides where the path does not.

    Returns:
        One of `GROUPS`.
    """
    if NORMALISATION.search(path.rsplit("/", 1)[0]) or "LayerNorm" in operator:
        return "normalisation"
    for group, pattern in PLACES:
        if pattern.search(path):
            return group
    return BY_OPERATOR.get(operator, "other")


def breakdown(variant: Variant, texts: Sequence[str], *, threads: int) -> dict[str, float]:
    """Mean milliseconds a text by group of operators.

    Args:
        variant: What to run.
        texts: The texts, one at a time; none gives no breakdown.
        threads: Threads to run with.

    Returns:
        A value for each of `GROUPS`; empty without texts.
    """
    if not texts:
        return {}
    if variant.manifest.format == "torch":
        times = _torch_times(TorchRuntime(variant, threads=threads), texts)
    elif variant.manifest.format == "openvino":
        times = _openvino_times(variant, texts, threads)
    else:
        times = _onnx_times(variant, texts, threads)
    return {group: times.get(group, 0.0) / len(texts) for group in GROUPS}


def _run(runtime: Runtime, texts: Sequence[str]) -> float:
    """Runs the texts; milliseconds spent in the tokenizer."""
    spent = 0.0
    for text in texts:
        began = time.perf_counter()
        encodings = runtime.encode([text])
        spent += time.perf_counter() - began
        runtime.infer(encodings)
    return spent * 1e3


class _ModuleClock:
    """Charges each module's group with the time between its start and its end, less its children's."""

    def __init__(self) -> None:
        self.times: dict[str, float] = defaultdict(float)
        self._open: list[tuple[float, float]] = []

    def watch(self, name: str, module: Any) -> None:
        group = group_of(name)

        def start(*_: Any) -> None:
            self._open.append((time.perf_counter(), 0.0))

        def end(*_: Any) -> None:
            began, inside = self._open.pop()
            whole = (time.perf_counter() - began) * 1e3
            self.times[group] += whole - inside
            if self._open:
                outer, spent = self._open[-1]
                self._open[-1] = (outer, spent + whole)

        module.register_forward_pre_hook(start)
        module.register_forward_hook(end)


def _torch_times(runtime: TorchRuntime, texts: Sequence[str]) -> dict[str, float]:
    _run(runtime, texts[:2])
    clock = _ModuleClock()
    for name, module in runtime.model.named_modules():
        clock.watch(name, module)
    tokenizer = _run(runtime, texts)
    return dict(clock.times) | {"tokenizer": tokenizer}


def _onnx_times(variant: Variant, texts: Sequence[str], threads: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="hasten-") as folder:
        runtime = OnnxRuntime(variant, threads=threads, profile_prefix=Path(folder) / "trace")
        tokenizer = _run(runtime, texts)
        events = msgspec.json.decode(runtime.end_profiling().read_bytes())
    times: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[group_of(name, event["args"].get("op_name", ""))] += event["dur"] / 1e3
    return dict(times) | {"tokenizer": tokenizer}


def _openvino_times(variant: Variant, texts: Sequence[str], threads: int) -> dict[str, float]:
    runtime = OpenVinoRuntime(variant, threads=threads, profile=True)
    _run(runtime, texts[:2])
    times: dict[str, float] = defaultdict(float)
    for text in texts:
        times["tokenizer"] += _run(runtime, [text])
        for name, kind, spent_ms in runtime.node_times_ms():
            times[group_of(name, kind)] += spent_ms
    return dict(times)
