"""sentence-transformers: a `CrossEncoder` with the ONNX backend, optimized at O3, and quantized for AVX2.

python build_sentence_transformers.py TORCH_VARIANT CALIBRATION_JSONL OUT
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from rows import Job, Recipe
from sentence_transformers import CrossEncoder, export_dynamic_quantized_onnx_model, export_optimized_onnx_model

LIBRARIES = ("sentence-transformers", "optimum-onnx", "optimum", "onnxruntime", "onnx", "torch", "transformers")


def main(job: Job) -> None:
    """Writes the rows."""
    exported = cache(lambda: CrossEncoder(str(job.checkpoint), backend="onnx", model_kwargs={"export": True}))

    def saved(export: Callable[[Any, str, str], None], how: str) -> Recipe:
        def write(folder: Path) -> None:
            work = job.work / how
            export(exported(), how, str(work))
            found = next(iter((work / "onnx").glob("*.onnx")))
            shutil.copyfile(found, folder / "model.onnx")

        return write

    job.write(
        {
            "sentence-transformers-O3-fp32": (
                "CrossEncoder(backend='onnx'), export_optimized_onnx_model O3",
                saved(export_optimized_onnx_model, "O3"),
            ),
            "sentence-transformers-dynamic": (
                "CrossEncoder(backend='onnx'), export_dynamic_quantized_onnx_model avx2",
                saved(export_dynamic_quantized_onnx_model, "avx2"),
            ),
        },
        LIBRARIES,
    )


if __name__ == "__main__":
    main(Job(sys.argv[1:]))
