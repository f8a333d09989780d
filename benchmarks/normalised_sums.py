"""Why the export keeps a sum and its normalisation apart: the time of both forms in onnxruntime, on one thread.

    python benchmarks/normalised_sums.py

`fused` is one `SkipLayerNormalization` with a bias; `apart` is a `Sum` of three and a `LayerNormalization`. Both stand
many times in a row in one graph, so that a call's overhead does not count; the two graphs are timed in turn. Nothing
else may run. The medians go to `results/normalised_sums.json`.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from provenance import save_result

HIDDEN = 384
ROWS = (32, 128)
IN_A_ROW = 50
ROUNDS = 60


def graph(form: str) -> bytes:
    """A chain of normalised sums."""
    nodes: list[Any] = []
    for n in range(IN_A_ROW):
        before, after = f"x{n}", f"x{n + 1}"
        if form == "fused":
            given = [before, "skip", "gamma", "beta", "bias"]
            nodes.append(helper.make_node("SkipLayerNormalization", given, [after], domain="com.microsoft"))
        else:
            nodes.append(helper.make_node("Sum", [before, "skip", "bias"], [f"s{n}"]))
            nodes.append(helper.make_node("LayerNormalization", [f"s{n}", "gamma", "beta"], [after], axis=-1))
    weights = [numpy_helper.from_array(np.ones(HIDDEN, np.float32), name) for name in ("gamma", "beta", "bias")]
    shape = [1, "rows", HIDDEN]
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x0", "skip")]
    output = helper.make_tensor_value_info(f"x{IN_A_ROW}", onnx.TensorProto.FLOAT, shape)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    body = helper.make_graph(nodes, form, inputs, [output], weights)
    return helper.make_model(body, opset_imports=opsets, ir_version=10).SerializeToString()


def main() -> None:
    """Times both forms, prints and saves."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {form: ort.InferenceSession(graph(form), options) for form in ("fused", "apart")}
    rows: list[dict[str, Any]] = []
    for size in ROWS:
        generator = np.random.default_rng(0)
        feeds = {name: generator.normal(size=(1, size, HIDDEN)).astype(np.float32) for name in ("x0", "skip")}
        samples: dict[str, list[float]] = {form: [] for form in sessions}
        for _ in range(ROUNDS):
            for form, session in sessions.items():
                began = time.perf_counter()
                session.run(None, feeds)
                samples[form].append((time.perf_counter() - began) / IN_A_ROW * 1e6)
        rows.append({"rows": size} | {f"{form}_us": round(float(np.median(s)), 1) for form, s in samples.items()})
    print(rows)
    save_result("normalised_sums", {"hidden": HIDDEN, "threads": 1, "rounds": ROUNDS, "sizes": rows})


if __name__ == "__main__":
    main()
