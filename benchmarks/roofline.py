"""How near variants come to what this machine can multiply, by length, and what the rest of their time goes to.

    python benchmarks/roofline.py VARIANT_FOLDER... [--threads N] [--requests 200] [--profiled 40]

The peaks are measured, not taken from a data sheet: the fastest of many products of activations with constant weights
in onnxruntime itself, in fp32 and in INT8 (unsigned activations, signed or unsigned weights), with numpy's product as a
second opinion in fp32; and what all threads together copy and read of arrays far larger than the caches. Operations of
a variant are counted from the shapes that onnxruntime's profiler records: two for each multiply-add of the products
with weights and of attention. Their rate is over the median latency of one text, tokenizer included. The share of the
peak is the time that they would take at the peaks (attention at that of fp32, in which it is done in every variant)
over that latency. Where the time goes is from the profiler, as medians over the texts; it slows the run down, so read
its shares. Nothing else may run.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import typer
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hasten.profiling import ProfileOptions, time_only
from hasten.runtime import OnnxRuntime, open_runtime
from hasten.variant import Variant, open_variant
from provenance import HERE, save_result
from roofline_picture import picture

LENGTHS_TOKENS = (16, 32, 64, 128, 256)
ROWS = (16, 32, 64, 128, 256, 512, 1024)
SHAPES = ((384, 1536), (768, 768), (768, 3072), (3072, 768))
KINDS = {"fp32": (np.float32, np.float32), "u8s8": (np.uint8, np.int8), "u8u8": (np.uint8, np.uint8)}
BUSY_S = 0.25
STREAM_BYTES = 1 << 28
WEIGHT_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat",
                   "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulNBits")  # fmt: skip
PACKED = ("Attention", "QAttention")  # their product for query, key and value is inside, and timed with them
GROUPS = {
    "products": WEIGHT_PRODUCTS,
    "attention": ("MultiHeadAttention", *PACKED, "Softmax", "RotaryEmbedding"),
    "normalisation": ("LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization"),
    "activation": ("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "Erf", "Tanh", "Relu"),
    "quantize, dequantize": ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
}
OTHER, BETWEEN, TOKENIZER = "other operators", "between operators", "tokenizer"


def text_of(source: Variant, tokens: int) -> str:
    """A text of exactly so many tokens, special ones included."""
    runtime = open_runtime(source)
    words = next(n for n in range(1, 2 * tokens) if len(runtime.encode(["time " * n])[0]) >= tokens)
    return "time " * words


def best_s(run: Callable[[], Any]) -> float:
    """The shortest of the runs that fit into a while, the first ones not counted."""
    run(), run()
    ends, fastest = time.perf_counter() + BUSY_S, math.inf
    while time.perf_counter() < ends:
        began = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def random_matrix(kind: type, rows: int, columns: int) -> NDArray[Any]:
    """Numbers of a type; those of 8 bits over its whole range."""
    generator = np.random.default_rng(0)
    if kind is np.float32:
        return generator.standard_normal((rows, columns), dtype=np.float32)
    return generator.integers(np.iinfo(kind).min, np.iinfo(kind).max, (rows, columns), dtype=kind, endpoint=True)


def product_session(weights: NDArray[Any], given: type, threads: int) -> ort.InferenceSession:
    """A graph of one product with constant weights."""
    exact = given is np.float32
    result = TensorProto.FLOAT if exact else TensorProto.INT32
    node = helper.make_node("MatMul" if exact else "MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("a", helper.np_dtype_to_tensor_dtype(np.dtype(given)), ["m", len(weights)])],
        [helper.make_tensor_value_info("y", result, ["m", weights.shape[1]])],
        [numpy_helper.from_array(weights, "b")],
    )  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def product_rates(kind: str, threads: int) -> list[dict[str, Any]]:
    """Billions of operations a second of onnxruntime's products, by rows and shape."""
    given, weight = KINDS[kind]
    found: list[dict[str, Any]] = []
    for inner, outer in SHAPES:
        session = product_session(random_matrix(weight, inner, outer), given, threads)
        for rows in ROWS:
            feed = {"a": random_matrix(given, rows, inner)}
            rate = 2e-9 * rows * inner * outer / best_s(partial(session.run, None, feed))
            found.append({"rows": rows, "inner": inner, "outer": outer, "gops": round(rate, 1)})
    return found


def numpy_rate() -> float:
    """Billions of operations a second of numpy's fp32 product, the best of its sizes."""
    rates = []
    for inner, outer in SHAPES:
        given, weights = random_matrix(np.float32, ROWS[-1], inner), random_matrix(np.float32, inner, outer)
        seconds = best_s(partial(np.matmul, given, weights, out=np.empty((ROWS[-1], outer), np.float32)))
        rates.append(2e-9 * ROWS[-1] * inner * outer / seconds)
    return round(max(rates), 1)


def memory_rates(threads: int) -> dict[str, float]:
    """Gigabytes a second: read and written by a copy, and read alone, by all threads together."""
    source, target = np.ones(STREAM_BYTES // 4, np.float32), np.zeros(STREAM_BYTES // 4, np.float32)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        copying = best_s(lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)))
        reading = best_s(lambda: list(pool.map(lambda part: part[0].max(), parts)))
    return {"copy": round(2e-9 * STREAM_BYTES / copying, 1), "read": round(1e-9 * STREAM_BYTES / reading, 1)}


def measured_peaks(threads: int) -> dict[str, Any]:
    """All peaks of the machine, measured in a process that has no more threads than the variants."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        products = {kind: process.submit(product_rates, kind, threads).result() for kind in KINDS}
        best = {kind: max(row["gops"] for row in rows) for kind, rows in products.items()}
        return {
            "fp32_gops": best["fp32"], "int8_gops": max(best["u8s8"], best["u8u8"]),
            "numpy_fp32_gops": process.submit(numpy_rate).result(),
            "memory_gb_per_s": process.submit(memory_rates, threads).result(),
            "products": products,
        }  # fmt: skip


def traced(variant: Variant, text: str, runs: int, threads: int) -> list[dict[str, Any]]:
    """What onnxruntime's profiler saw of each run, after some that do not count."""
    with tempfile.TemporaryDirectory() as folder:
        runtime = OnnxRuntime(variant, threads=threads, profile_prefix=Path(folder) / "trace")
        for _ in range(runs + 5):
            runtime.infer(runtime.encode([text]))
        events = msgspec.json.decode(runtime.end_profiling().read_bytes())
    whole = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: e["ts"])[-runs:]
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return [
        {"us": run["dur"], "nodes": [n for n in nodes if run["ts"] <= n["ts"] < run["ts"] + run["dur"]]}
        for run in whole
    ]


def shapes(event: dict[str, Any], which: str) -> list[list[int]]:
    """The shapes of a node's inputs or outputs; constants that were repacked are not among them."""
    return [next(iter(entry.values())) for entry in event["args"][f"{which}_type_shape"]]


def multiply_adds(event: dict[str, Any]) -> tuple[int, int]:
    """A node's multiply-adds: in products with weights, and in attention."""
    operator, given, made = event["args"]["op_name"], shapes(event, "input"), shapes(event, "output")
    if operator in WEIGHT_PRODUCTS:
        count = math.prod(made[0]) * given[0][-1]
        with_weights = len(given) < 2 or len(given[1]) < 3
        return (count, 0) if with_weights else (0, count)
    if operator == "MultiHeadAttention":
        (batch, queries, hidden), keys = given[0], given[1][1]
        return 0, 2 * batch * queries * keys * hidden
    if operator in PACKED:
        (batch, tokens, width), hidden = given[0], made[0][-1]
        return 3 * batch * tokens * width * hidden, 2 * batch * tokens * tokens * hidden
    return 0, 0


def group_of(event: dict[str, Any]) -> str:
    """What a node's time is spent on."""
    operator = event["args"]["op_name"]
    if operator in WEIGHT_PRODUCTS and multiply_adds(event)[1]:
        return "attention"
    return next((group for group, operators in GROUPS.items() if operator in operators), OTHER)


def time_by_group(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Median milliseconds of a run by group, and between the operators."""
    rows: list[dict[str, float]] = []
    for run in runs:
        row: dict[str, float] = defaultdict(float)
        for event in run["nodes"]:
            row[group_of(event)] += event["dur"] / 1e3
        row[BETWEEN] = run["us"] / 1e3 - sum(row.values())
        rows.append(row)
    return {g: float(np.median([row.get(g, 0.0) for row in rows])) for g in (*GROUPS, OTHER, BETWEEN)}


def weight_bytes(variant: Variant) -> int:
    """Bytes of the matrices that every text multiplies with; each is read once a text."""
    graph = onnx.load(variant.path / "model.onnx").graph
    used = {name for node in graph.node if node.op_type not in ("Gather", "Shape", "Slice") for name in node.input}
    sources = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    looked_up = {n.input[0] for n in graph.node if n.op_type == "Gather"}
    used |= {sources[name] for name in used if name in sources}
    matrices = [i for i in graph.initializer if len(i.dims) == 2 and i.name in used and i.name not in looked_up]
    return sum(numpy_helper.to_array(matrix).nbytes for matrix in matrices)


def row_of(variant: Variant, tokens: int, latency: Any, runs: list[dict[str, Any]], peaks: Any) -> dict[str, Any]:
    """One variant at one length."""
    counts = [multiply_adds(event) for event in runs[0]["nodes"]]
    weights, attention = (sum(part) for part in zip(*counts, strict=True))
    apart = sum(multiply_adds(event)[0] for event in runs[0]["nodes"] if group_of(event) == "products")
    p50_ms = latency.percentile(50).value
    ideal_ms = 2e-6 * (weights / peaks[f"{variant.manifest.precision}_gops"] + attention / peaks["fp32_gops"])
    groups = time_by_group(runs)
    operators = len(runs[0]["nodes"])
    return {
        "variant": variant.name, "precision": variant.manifest.precision, "tokens": tokens,
        "p50_ms": round(p50_ms, 3), "tokenizer_ms": round(float(np.median(latency.tokenizer_ms)), 3),
        "multiply_adds": {"products": weights, "attention": attention},
        "gops": round(2e-6 * (weights + attention) / p50_ms, 1), "share_of_peak": round(ideal_ms / p50_ms, 3),
        "products_gops": round(2e-6 * apart / groups["products"], 1),
        "weight_bytes": weight_bytes(variant),
        "operators": operators,
        "profiled_ms": {g: round(ms, 4) for g, ms in groups.items()}
        | {TOKENIZER: round(float(np.median(latency.tokenizer_ms)), 4)},
    }  # fmt: skip


def main(
    variants: list[Path], threads: Annotated[int | None, typer.Option()] = None, requests: int = 200,
    profiled: int = 40,
) -> None:  # fmt: skip
    """Measures the machine and the variants, prints, saves, draws."""
    opened = [open_variant(folder) for folder in variants]
    options = ProfileOptions(threads=threads)
    peaks = measured_peaks(options.resolved_threads)
    print({key: value for key, value in peaks.items() if key != "products"}, flush=True)
    rows: list[dict[str, Any]] = []
    for tokens in LENGTHS_TOKENS:
        text = text_of(opened[0], tokens)
        latencies = time_only(opened, [text] * requests, options)
        for variant, latency in zip(opened, latencies, strict=True):
            runs = traced(variant, text, profiled, options.resolved_threads)
            rows.append(row_of(variant, tokens, latency, runs, peaks))
            print(rows[-1], flush=True)
    result = {"threads": options.resolved_threads, "requests": requests, "profiled": profiled}
    save_result("roofline", result | {"peaks": peaks, "rows": rows})
    (HERE / "results" / "roofline.svg").write_text(picture(peaks, rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
