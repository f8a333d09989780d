"""Olive: conversion, its pass round onnxruntime's transformer optimizer, its quantization passes for CPUs.

    python build_olive.py TORCH_VARIANT CALIBRATION_JSONL OUT

The passes and their order are those of Olive's example for BERT on CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ |= {"OLIVE_DISABLE_TELEMETRY": "1"}

import olive
from rows import Job, Recipe

LIBRARIES = ("olive-ai", "onnxruntime", "onnx", "torch", "transformers")
CONVERSION = {"conversion": {"type": "OnnxConversion", "target_opset": 18}}
OPTIMIZATION = {"optimization": {"type": "OrtTransformersOptimization", "model_type": "bert"}}
DYNAMIC = {"quantization": {"type": "OnnxDynamicQuantization"}}
STATIC = {"quantization": {"type": "OnnxStaticQuantization", "data_config": "calibration"}}


class Workflow:
    """A run of Olive on one classifier."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def recipe(self, name: str, passes: dict[str, Any]) -> Recipe:
        """What writes the model that these passes end in."""

        def write(folder: Path) -> None:
            out = self.job.work / name
            olive.run(self._config(passes, out), tempdir=str(self.job.work))
            found = sorted(out.rglob("*.onnx"))
            if not found:
                raise RuntimeError("the workflow ended without a model")
            shutil.copyfile(found[0], folder / "model.onnx")

        return write

    def _config(self, passes: dict[str, Any], out: Path) -> dict[str, Any]:
        heads = {"num_heads": self.job.config["num_attention_heads"], "hidden_size": self.job.config["hidden_size"]}
        passes = {
            name: step | (heads if step["type"] == "OrtTransformersOptimization" else {})
            for name, step in passes.items()
        }
        return {
            "input_model": {
                "type": "HfModel", "model_path": str(self.job.checkpoint), "task": "text-classification",
                "load_kwargs": {"attn_implementation": "eager"},
            },
            "systems": {"here": {"type": "LocalSystem", "accelerators": [
                {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
            ]}},
            "data_configs": [self._calibration()],
            "passes": passes, "target": "here", "host": "here",
            "output_dir": str(out), "cache_dir": str(self.job.work / "cache"), "evaluate_input_model": False,
        }  # fmt: skip

    def _calibration(self) -> dict[str, Any]:
        """The texts as Olive reads a data set: with a label, though calibration uses none."""
        path = self.job.work / "calibration.json"
        path.write_text("\n".join(json.dumps({"text": text, "label": 0}) for text in self.job.texts), encoding="utf-8")
        return {
            "name": "calibration", "type": "HuggingfaceContainer",
            "load_dataset_config": {"data_name": "json", "data_files": str(path), "split": "train"},
            "pre_process_data_config": {
                "model_name": str(self.job.checkpoint), "input_cols": ["text"], "label_col": "label",
                "task": "text-classification", "max_length": self.job.max_tokens, "padding": False,
            },
            "dataloader_config": {"batch_size": 1},
        }  # fmt: skip


def main(job: Job) -> None:
    """Writes the rows."""
    flow = Workflow(job)
    plans = {
        "olive-fp32": CONVERSION | OPTIMIZATION,
        "olive-dynamic": CONVERSION | OPTIMIZATION | DYNAMIC,
        "olive-static": CONVERSION | OPTIMIZATION | STATIC,
        "olive-unfused-static": CONVERSION | STATIC,
    }
    how = {name: ", ".join(step["type"] for step in passes.values()) for name, passes in plans.items()}
    job.write({name: (how[name], flow.recipe(name, passes)) for name, passes in plans.items()}, LIBRARIES)


if __name__ == "__main__":
    main(Job(sys.argv[1:]))
