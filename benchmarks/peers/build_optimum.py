"""optimum-onnx: its export, its optimizer at O2 and O3, its quantizer for AVX2.

    python build_optimum.py TORCH_VARIANT CALIBRATION_JSONL OUT

The quantizer is tried on the plain export and on the optimized graph, without calibration and with.
"""

from __future__ import annotations

import shutil
import sys
from functools import cache
from pathlib import Path

from datasets import Dataset
from optimum.onnxruntime import ORTModelForSequenceClassification, ORTOptimizer, ORTQuantizer
from optimum.onnxruntime.configuration import AutoCalibrationConfig, AutoOptimizationConfig, AutoQuantizationConfig
from rows import Job, Recipe

LIBRARIES = ("optimum-onnx", "optimum", "onnxruntime", "onnx", "torch", "transformers")


class Graphs:
    """The fp32 graphs, each made when it is first asked for."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.exported, self.optimized = cache(self._exported), cache(self._optimized)

    def _exported(self) -> Path:
        """The plain export."""
        folder = self.job.work / "exported"
        ORTModelForSequenceClassification.from_pretrained(self.job.checkpoint, export=True).save_pretrained(folder)
        return folder / "model.onnx"

    def _optimized(self, level: str) -> Path:
        """The export after the optimizer."""
        folder = self.job.work / level
        optimizer = ORTOptimizer.from_pretrained(self.exported().parent, file_names=["model.onnx"])
        optimizer.optimize(getattr(AutoOptimizationConfig, level)(), folder, file_suffix="")
        return folder / "model.onnx"

    def source(self, level: str) -> Path:
        """The export, or what the optimizer makes of it at a level."""
        return self.optimized(level) if level else self.exported()

    def fp32(self, level: str) -> Recipe:
        """What writes a fp32 graph."""
        return lambda folder: shutil.copyfile(self.source(level), folder / "model.onnx") and None

    def int8(self, level: str, *, static: bool) -> Recipe:
        """What writes an INT8 graph."""

        def write(folder: Path) -> None:
            quantizer = ORTQuantizer.from_pretrained(self.source(level).parent, file_name="model.onnx")
            config = AutoQuantizationConfig.avx2(is_static=static, per_channel=False)
            ranges = self._ranges(quantizer, config.operators_to_quantize) if static else None
            quantizer.quantize(config, folder, file_suffix="", calibration_tensors_range=ranges)

        return write

    def _ranges(self, quantizer: ORTQuantizer, operators: list[str]) -> dict[str, tuple[float, float]]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        rows = quantizer.clean_calibration_dataset(Dataset.from_list(self.job.encoded(names)))
        return quantizer.fit(
            rows, AutoCalibrationConfig.minmax(rows), self.job.work / "augmented.onnx", operators_to_quantize=operators
        )


def main(job: Job) -> None:
    """Writes the rows."""
    graphs = Graphs(job)
    recipes: dict[str, tuple[str, Recipe]] = {}
    for level in ("O2", "O3"):
        recipes[f"optimum-{level}-fp32"] = (f"ORTOptimizer {level}", graphs.fp32(level))
    for level in ("", "O3"):
        name, start = (f"optimum-{level}", f"ORTOptimizer {level}") if level else ("optimum", "export")
        for static in (False, True):
            kind = "static" if static else "dynamic"
            how = f"{start}, ORTQuantizer avx2 {kind}"
            recipes[f"{name}-{kind}"] = (how, graphs.int8(level, static=static))
    job.write(recipes, LIBRARIES)


if __name__ == "__main__":
    main(Job(sys.argv[1:]))
