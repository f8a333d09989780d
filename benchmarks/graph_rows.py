"""What benchmarks of graphs share: a graph as a variant folder, a text of a length, a ratio."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hasten.golden import finish
from hasten.intervals import median_ratio
from hasten.measurement import Latency
from hasten.runtime import open_runtime
from hasten.variant import Variant, building, copy_configuration, open_variant


def as_variant(source: Variant, graph: Path, folder: Path, precision: Any) -> Variant:
    """A graph with the source's configuration and tokenizer."""
    with building(folder) as draft:
        copy_configuration(source, draft)
        (draft / "model.onnx").write_bytes(graph.read_bytes())
        graph.unlink()
        finish(draft, replace(source.manifest, name=folder.name, format="onnx", precision=precision))
    return open_variant(folder)


def text_of(source: Variant, tokens: int) -> str:
    """A text of exactly so many tokens, special ones included."""
    runtime = open_runtime(source)
    words = next(n for n in range(1, 2 * tokens) if len(runtime.encode(["time " * n])[0]) >= tokens)
    return "time " * words


def ratio(ours: Latency, theirs: Latency) -> dict[str, float | None]:
    """Their median over ours: above 1 we are faster."""
    found = median_ratio(theirs.samples_ms, ours.samples_ms)
    return {key: None if value is None else round(value, 3) for key, value in asdict(found).items()}
