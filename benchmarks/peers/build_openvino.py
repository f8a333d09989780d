"""OpenVINO's conversion from PyTorch, and NNCF's static INT8 of it.

    python build_openvino.py TORCH_VARIANT CALIBRATION_JSONL OUT

Shapes stay dynamic, as lengths of texts are.
"""

from __future__ import annotations

import sys
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import torch
from rows import Job
from transformers import AutoModelForSequenceClassification

LIBRARIES = ("openvino", "nncf", "torch", "transformers")
MODEL = "openvino_model.xml"


def converted(job: Job) -> Any:
    """The fp32 model; attention as transformers has it by default, which OpenVINO recognises."""
    model = AutoModelForSequenceClassification.from_pretrained(job.checkpoint, dtype=torch.float32).eval()
    model.config.return_dict = False
    names = [
        name
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in signature(model.forward).parameters
    ]
    example = {name: torch.ones(2, 9, dtype=torch.long) for name in names}
    example["attention_mask"][0, 5:] = 0
    found = ov.convert_model(model, example_input=example)
    for port in found.inputs:
        port.tensor.set_names(port.names & set(names))  # it has names of its own beside them
    found.reshape({port: ov.PartialShape([-1, -1]) for port in found.inputs})
    return found


def main(job: Job) -> None:
    """Writes the rows."""
    fp32 = cache(lambda: converted(job))

    def int8(folder: Path) -> None:
        names = [port.any_name for port in fp32().inputs]
        batches = [{name: np.asarray([ids]) for name, ids in row.items()} for row in job.encoded(names)]
        quantized = nncf.quantize(
            fp32(), nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
        )
        ov.save_model(quantized, folder / MODEL, compress_to_fp16=False)

    def plain(folder: Path) -> None:
        ov.save_model(fp32(), folder / MODEL, compress_to_fp16=False)

    job.write(
        {
            "openvino-fp32": ("ov.convert_model", plain),
            "openvino-int8": ("ov.convert_model, nncf.quantize for transformers", int8),
        },
        LIBRARIES,
    )


if __name__ == "__main__":
    main(Job(sys.argv[1:]))
