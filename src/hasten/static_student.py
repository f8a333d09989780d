"""A student without layers: the teacher's token embeddings, pooled, before a small network; distilled like any other.

Order of words is lost, attention is gone, and what is left takes some ten microseconds. On easy data that is enough,
and then the budget is met at a price that no transformer comes near.

Source: Tulkens and van Dongen 2024, "Model2Vec: fast state-of-the-art static embeddings" (embeddings reduced by
principal components, pooled by their mean). We differ in that the table starts from the teacher's fine-tuned token
embeddings rather than from its outputs for single tokens, that the largest value is pooled beside the mean, and in that
table and network are trained together on the teacher's logits.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from hasten.errors import ArtifactError, ParityError
from hasten.golden import finish
from hasten.invariance import batch_invariance
from hasten.measurement import library_versions
from hasten.runtime import open_runtime, predict_logits
from hasten.teaching import DistillOptions, Lesson, answers_loss
from hasten.torch_runtime import load_torch_model
from hasten.torch_training import Progress, TrainingSet, TrainOptions, fit
from hasten.tracing import OPSET
from hasten.variant import Parameters, StepRecord, Variant, building, copy_configuration

ARCHITECTURE = "static-embeddings"
COMPARED_TEXTS = 256
TOLERANCE = 1e-4
LOWEST = -1e4  # what padding counts as where the largest value is taken
VERSIONED = ("torch", "onnx", "onnxruntime")


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticOptions:
    """How large, and how to train.

    Attributes:
        width: Dimensions kept of the teacher's embeddings, at least 1.
        hidden: Neurons of the network, at least 1.
        train: How to train.
    """

    width: int = 256
    hidden: int = 256
    train: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=10, learning_rate=1e-3))


def train_static(
    teacher: Variant, out: Path, options: StaticOptions | None = None, *, name: str = "static", lesson: Lesson,
    distillation: DistillOptions, work: Path, progress: Progress | None = None,
) -> Variant:  # fmt: skip
    """Trains a static student on a teacher's logits and the true labels.

    Args:
        teacher: The torch variant whose embeddings, tokenizer and labels to take.
        out: The folder to make.
        options: How large, and how to train; the defaults if None.
        name: The new variant's name.
        lesson: Texts, labels, and who answers.
        distillation: Objective and weights of the loss.
        work: Folder for the cached logits and the checkpoint.
        progress: Called with the steps done and the steps in all.

    Returns:
        An ONNX variant in fp32, proven to answer as the network that was trained.

    Raises:
        ArtifactError: The teacher is no torch variant.
        HastenError: The loss is NaN.
        ParityError: The graph answers otherwise than the network.
    """
    options = options or StaticOptions()
    if teacher.manifest.format != "torch":
        raise ArtifactError(
            f"{teacher.path}: format is {teacher.manifest.format}; embeddings come from a torch variant"
        )
    made_by = library_versions((*VERSIONED, "hasten"))  # a checkpoint of another version is not gone on from
    parts = [teacher.digest, *lesson.identity, asdict(options), asdict(distillation), made_by]
    key = hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()
    model = _network(_reduced(teacher, options.width), len(teacher.labels), options)
    data = TrainingSet.of(teacher, model, lesson.texts)
    loss = answers_loss(model, lesson, distillation, work, threads=options.train.threads)
    fit(model, data, loss, options.train, checkpoint=work / f"{name}.checkpoint.safetensors", key=key,
        progress=progress)  # fmt: skip
    weights = {key: weight.detach().numpy() for key, weight in model.state_dict().items()}
    with building(out) as draft:
        copy_configuration(teacher, draft)
        _write(weights, draft / "model.onnx")
        step = StepRecord(
            name="static", parent=teacher.digest, options=asdict(options) | {"distillation": asdict(distillation)},
            versions=library_versions(VERSIONED), facts=lesson.facts,
        )  # fmt: skip
        table = weights["table.weight"].size
        manifest = replace(
            teacher.manifest, name=name, format="onnx", precision="fp32", architecture=ARCHITECTURE, plan=None,
            parameters=Parameters(embedding=table, encoder=0, head=sum(w.size for w in weights.values()) - table),
            step=step,
        )  # fmt: skip
        runtime = open_runtime(Variant(path=draft, manifest=manifest))
        texts = lesson.data.texts[:COMPARED_TEXTS]
        difference = float(np.abs(_answers(model, data, len(texts)) - predict_logits(runtime, texts, batch=8)).max())
        if not difference <= TOLERANCE:
            raise ParityError(f"{name}: the graph's logits differ by {difference:.2g} from those of the network")
        holds = batch_invariance(runtime, texts).holds
        sealed = finish(draft, replace(manifest, batch_invariant=holds))
    return Variant(path=out.resolve(), manifest=sealed)


def _reduced(teacher: Variant, width: int) -> Any:
    """The teacher's token embeddings on their principal components; tensor of shape [tokens, at most width]."""
    import torch

    torch.set_num_threads(1)  # whatever ran before, or did not since it was on disk
    table = load_torch_model(teacher).get_input_embeddings().weight.detach().float()
    centred = table - table.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    reduced = centred @ directions[:width].T
    return reduced / reduced.std()


def _network(table: Any, labels: int, options: StaticOptions) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(options.train.seed)

    class Static(nn.Module):
        """Pooled embeddings before two layers."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding.from_pretrained(table, freeze=False)
            self.hidden = nn.Linear(2 * table.shape[1], options.hidden)
            self.output = nn.Linear(options.hidden, labels)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            kept = attention_mask.bool()[:, :, None]
            vectors = self.table(input_ids)
            mean = (vectors * kept).sum(1) / kept.sum(1).clamp(min=1)
            largest = vectors.masked_fill(~kept, LOWEST).amax(1)
            return SimpleNamespace(logits=self.output(self.hidden(torch.cat([mean, largest], -1)).relu()))

    return Static()


def _answers(model: Any, data: TrainingSet, rows: int) -> Any:
    import torch

    with torch.inference_mode():
        return np.concatenate([model(**data.inputs([row])).logits.numpy() for row in range(rows)])


def _write(weights: dict[str, Any], path: Path) -> None:
    """Writes the network as a graph of standard operators."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = weights | {
        "tokens": np.asarray([1], dtype=np.int64), "width": np.asarray([2], dtype=np.int64),
        "one": np.float32(1), "lowest": np.float32(LOWEST),
    }  # fmt: skip
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Gather", ["table.weight", "input_ids"], "vectors", {}),
        ("Cast", ["attention_mask"], "mask", {"to": TensorProto.FLOAT}),
        ("Unsqueeze", ["mask", "width"], "kept", {}),
        ("Mul", ["vectors", "kept"], "own", {}),
        ("ReduceSum", ["own", "tokens"], "sum", {"keepdims": 0}),
        ("ReduceSum", ["kept", "tokens"], "number", {"keepdims": 0}),
        ("Max", ["number", "one"], "at_least_one", {}),
        ("Div", ["sum", "at_least_one"], "mean", {}),
        ("Cast", ["kept"], "is_kept", {"to": TensorProto.BOOL}),
        ("Where", ["is_kept", "vectors", "lowest"], "candidates", {}),
        ("ReduceMax", ["candidates", "tokens"], "largest", {"keepdims": 0}),
        ("Concat", ["mean", "largest"], "pooled", {"axis": 1}),
        ("Gemm", ["pooled", "hidden.weight", "hidden.bias"], "before", {"transB": 1}),
        ("Relu", ["before"], "active", {}),
        ("Gemm", ["active", "output.weight", "output.bias"], "logits", {"transB": 1}),
    ]
    graph = helper.make_graph(
        [helper.make_node(kind, given, [made], **attributes) for kind, given, made, attributes in nodes], "static",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
         for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(weights["output.bias"])])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path)
