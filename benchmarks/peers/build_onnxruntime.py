"""onnxruntime's own tools: its transformer optimizer, and `quantize_dynamic` with its defaults.

    python build_onnxruntime.py TORCH_VARIANT CALIBRATION_JSONL OUT

They start from both of PyTorch's tracers: `dynamo`, which is the default today, and the older one, whose graphs the
optimizer was written for. The older one needs transformers 4: it traces a wrong mask in transformers 5.
"""

from __future__ import annotations

import sys
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from rows import Job, Recipe
from transformers import AutoModelForSequenceClassification

OPSET = 18
LIBRARIES = ("onnxruntime", "onnx", "torch", "transformers")


class Graphs:
    """The fp32 graphs, each made when it is first asked for."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.plain, self.optimized = cache(self._plain), cache(self._optimized)

    def _plain(self, tracer: str) -> Path:
        """PyTorch's own export."""
        model = AutoModelForSequenceClassification.from_pretrained(
            self.job.checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        model.config.return_dict = tracer == "dynamo"
        accepted = signature(model.forward).parameters
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted]
        example = {name: torch.ones(2, 9, dtype=torch.long) for name in names}
        example["attention_mask"][0, 5:] = 0
        axes = {name: {0: "batch", 1: "sequence"} for name in names}
        how: dict[str, Any] = {"dynamo": True, "dynamic_shapes": axes}
        if tracer == "torchscript":
            how = {"dynamo": False, "dynamic_axes": axes | {"logits": {0: "batch"}}, "do_constant_folding": True}
        path = self.job.work / f"{tracer}.onnx"
        with torch.no_grad():
            torch.onnx.export(
                model, (), str(path), kwargs=example, input_names=names, output_names=["logits"], opset_version=OPSET,
                **how,
            )  # fmt: skip
        whole = onnx.load(path)  # with weights that the exporter put beside it
        onnx.save_model(whole, path, save_as_external_data=False)
        return path

    def _optimized(self, tracer: str) -> Path:
        """That graph after the optimizer; `bert` is its type for all encoders like it."""
        config, path = self.job.config, self.job.work / f"{tracer}-optimizer.onnx"
        done = optimize_model(
            str(self.plain(tracer)), "bert", num_heads=config["num_attention_heads"],
            hidden_size=config["hidden_size"], optimization_options=FusionOptions("bert"),
        )  # fmt: skip
        print(tracer, done.get_fused_operator_statistics(), file=sys.stderr)
        done.save_model_to_file(str(path))
        return path


def saved(make: Any, tracer: str, *, dynamic: bool = False) -> Recipe:
    """What writes a graph, as it is or quantized, into a row's folder."""

    def write(folder: Path) -> None:
        source: Path = make(tracer)
        if dynamic:
            extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}
            quantize_dynamic(source, folder / "model.onnx", extra_options=extra)
        else:
            (folder / "model.onnx").write_bytes(source.read_bytes())

    return write


def main(job: Job) -> None:
    """Writes the rows."""
    graphs = Graphs(job)
    recipes: dict[str, tuple[str, Recipe]] = {}
    for prefix, tracer in (("ort", "dynamo"), ("ort-torchscript", "torchscript")):
        for name, make in (("plain", graphs.plain), ("optimizer", graphs.optimized)):
            how = f"torch.onnx.export({'dynamo=True' if tracer == 'dynamo' else 'dynamo=False'})"
            how += ", onnxruntime.transformers.optimizer" if name == "optimizer" else ""
            recipes[f"{prefix}-{name}-fp32"] = (how, saved(make, tracer))
            recipes[f"{prefix}-{name}-dynamic"] = (f"{how}, quantize_dynamic", saved(make, tracer, dynamic=True))
    job.write(recipes, LIBRARIES)


if __name__ == "__main__":
    main(Job(sys.argv[1:]))
