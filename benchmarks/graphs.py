"""hasten's graphs against those of onnxruntime's own tools: latency by length, batch invariance, accuracy.

    python benchmarks/graphs.py TORCH_VARIANT --data LABELLED_FILE [--train TEXTS] [--out OUT]

Peers, all from the same trace of PyTorch's exporter and run by the same onnxruntime with the same threads: `plain` is
that trace as it is, `optimizer` is what `onnxruntime.transformers.optimizer` makes of it; `-dynamic` are the two after
`quantize_dynamic` with its defaults. Latencies are of texts of an exact length in tokens, the tokenizer included, in
one interleaved run a length. Ratios are of medians, with a paired bootstrap interval. Nothing else may run.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model

from hasten import onnx_export
from hasten.golden import finish
from hasten.intervals import median_ratio, proportion
from hasten.invariance import batch_invariance
from hasten.measurement import Latency
from hasten.onnx_export import export
from hasten.profiling import ProfileOptions, time_only
from hasten.quantization import QuantizeOptions, quantize
from hasten.runtime import open_runtime, predict_logits
from hasten.torch_runtime import load_torch_model
from hasten.variant import Variant, building, copy_configuration, open_variant
from hasten.workload import Workload, read_texts, read_workload
from provenance import save_result

LENGTHS_TOKENS = (16, 32, 64, 128, 256)
REQUESTS = 200
CALIBRATION_TEXTS = 256
PEERS = {"onnx-fp32": ("plain", "optimizer"), "onnx-int8": ("plain-dynamic", "optimizer-dynamic")}


def peers(source: Variant, out: Path) -> list[Variant]:
    """The four graphs of onnxruntime's tools, as variant folders."""
    model = load_torch_model(source, attention="eager")
    plain, optimized = out / "plain.onnx", out / "optimizer.onnx"
    onnx.save_model(onnx_export._traced(model), plain)  # the same trace that hasten starts from
    sizes = {"num_heads": model.config.num_attention_heads, "hidden_size": model.config.hidden_size}
    optimize_model(str(plain), "bert", **sizes).save_model_to_file(str(optimized))  # its type for all encoders
    made: list[Variant] = []
    for graph in (plain, optimized):
        quantized = out / f"{graph.stem}-dynamic.onnx"
        quantize_dynamic(graph, quantized, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
        made += [as_variant(source, graph, out / graph.stem, "fp32")]
        made += [as_variant(source, quantized, out / quantized.stem, "int8")]
    return made


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


def main(
    source: Path, data: Annotated[str, typer.Option()], train: Annotated[str | None, typer.Option()] = None,
    out: Path = Path("graphs"),
) -> None:  # fmt: skip
    """Makes all graphs, measures, prints and saves."""
    logging.disable(logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    variant = open_variant(source)
    texts = read_texts(train or data)[:CALIBRATION_TEXTS]
    fp32 = export(variant, out / "onnx-fp32", texts=texts[:50])
    ours = [fp32, quantize(fp32, out / "onnx-int8", texts=texts)]
    ours.append(quantize(fp32, out / "onnx-int8-dynamic", QuantizeOptions(method="dynamic"), texts=texts))
    every = [*ours, *peers(variant, out)]
    options = ProfileOptions()
    rows: list[dict[str, Any]] = []
    for tokens in LENGTHS_TOKENS:
        latencies = time_only(every, [text_of(variant, tokens)] * REQUESTS, options)
        measured = {v.name: latency for v, latency in zip(every, latencies, strict=True)}
        row: dict[str, Any] = {"tokens": tokens}
        row["p50_ms"] = {name: round(latency.percentile(50).value, 3) for name, latency in measured.items()}
        row["times_faster_than"] = {
            f"{mine} / {peer}": ratio(measured[mine], measured[peer]) for mine, names in PEERS.items() for peer in names
        }
        rows.append(row)
        print(row, flush=True)
    workload = read_workload(data, name="test", labels=variant.labels)
    quality = [quality_of(v, workload) for v in every]
    save_result(f"graphs_{variant.manifest.architecture}", {
        "model": variant.name, "parameters": variant.manifest.parameters.total, "threads": options.resolved_threads,
        "requests": REQUESTS, "latency": rows, "quality": quality,
    })  # fmt: skip


def quality_of(variant: Variant, workload: Workload) -> dict[str, Any]:
    """Accuracy on single texts, and whether company changes answers."""
    runtime = open_runtime(variant, threads=ProfileOptions().resolved_threads)
    right = predict_logits(runtime, workload.texts).argmax(-1) == np.asarray(workload.labels)
    accuracy = proportion(int(right.sum()), len(right))
    company = batch_invariance(runtime, workload.texts[:CALIBRATION_TEXTS])
    row = {
        "name": variant.name,
        "size_bytes": variant.size_bytes,
        "accuracy": asdict(accuracy),
        "company": asdict(company),
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    typer.run(main)
