"""Distillation: a student learns the teacher's softened answers, with a term for the true labels.

Source: Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", section 2. We differ in that the
teacher's logits are computed once, cached and hashed, so the teacher runs over each text a single time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hasten.errors import ArtifactError, DataError, UsageError
from hasten.files import write_atomically
from hasten.golden import finish
from hasten.measurement import library_versions
from hasten.runtime import Logits, open_runtime, predict_logits
from hasten.tokenization import TextEncoder, pad_token_id
from hasten.torch_runtime import load_torch_model
from hasten.torch_training import Progress, TrainingSet, TrainOptions, fit
from hasten.variant import StepRecord, Variant, building, copy_configuration
from hasten.workload import Workload

TEACHER_BATCH = 16
VERSIONED = ("torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions:
    """How to distil.

    Attributes:
        temperature: Softens both distributions, above 0.
        soft_weight: Weight of the teacher's term, 0 to 1; the true labels have the rest.
        train: How to train.
    """

    temperature: float = 2.0
    soft_weight: float = 0.9
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UsageError: A value is out of range.
        """
        if not self.temperature > 0:
            raise UsageError(f"the temperature must be above 0, not {self.temperature}")
        if not 0 <= self.soft_weight <= 1:
            raise UsageError(f"the soft weight is a share, 0 to 1, not {self.soft_weight}")
        if self.train.epochs < 1:
            raise UsageError(f"at least 1 epoch is needed, not {self.train.epochs}")


def distillation_loss(student: Any, teacher: Any, labels: Any, options: DistillOptions) -> Any:
    """The weighted sum of Kullback-Leibler divergence to the teacher and cross-entropy with the labels.

    Args:
        student: Logits; tensor of shape [batch, labels].
        teacher: Logits; tensor of shape [batch, labels].
        labels: Label ids; tensor of shape [batch].
        options: Temperature and weights.

    Returns:
        A scalar tensor: w T² KL(softmax(teacher / T) || softmax(student / T)) + (1 - w) CE(student, labels).
    """
    from torch.nn import functional

    soft = functional.kl_div(
        (student / options.temperature).log_softmax(-1),
        (teacher / options.temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    hard = functional.cross_entropy(student, labels)
    return options.soft_weight * options.temperature**2 * soft + (1 - options.soft_weight) * hard


def distill(
    student: Variant,
    out: Path,
    options: DistillOptions | None = None,
    *,
    name: str,
    data: Workload,
    teacher: Variant | None,
    work: Path,
    progress: Progress | None = None,
) -> Variant:
    """Trains a student on a teacher's logits and the true labels.

    Args:
        student: A torch variant to start from.
        out: The folder to make.
        options: How; the defaults if None.
        name: The new variant's name.
        data: Training texts with labels.
        teacher: What gives the logits, in any format; None trains on the labels alone, which shows what distillation
            brings.
        work: Folder for the cached logits and the checkpoint.
        progress: Called with the steps done and the steps in all.

    Returns:
        The trained torch variant.

    Raises:
        ArtifactError: The student is no torch variant, or teacher and student have different labels.
        DataError: There are no texts.
        HastenError: The loss is NaN.
    """
    options = options or DistillOptions()
    if teacher is None:
        options = replace(options, soft_weight=0.0)
    _check(student, teacher, data)
    key = _key(student, teacher, data, options)
    soft = None if teacher is None else teacher_logits(teacher, data.texts, work, threads=options.train.threads)
    model = load_torch_model(student)
    training_set = TrainingSet(encodings=TextEncoder(student)(data.texts), pad_id=pad_token_id(student))
    loss = _loss(soft, data.labels, options)
    fit(model, training_set, loss, options.train, checkpoint=work / f"{name}.checkpoint.safetensors", key=key,
               progress=progress)  # fmt: skip
    facts = {"texts": len(data), "data": data.digest}
    step = StepRecord(
        name="distill" if teacher else "train",
        parent=student.digest,
        options=asdict(options) | {"teacher": teacher.digest if teacher else None},
        versions=library_versions(VERSIONED),
        facts=facts,
    )
    with building(out) as draft:
        copy_configuration(student, draft)
        model.save_pretrained(draft)
        sealed = finish(draft, replace(student.manifest, name=name, step=step))
    return Variant(path=out.resolve(), manifest=sealed)


def _check(student: Variant, teacher: Variant | None, data: Workload) -> None:
    if student.manifest.format != "torch":
        raise ArtifactError(f"{student.path}: format is {student.manifest.format}; only a torch variant can be trained")
    if teacher is not None and teacher.labels != student.labels:
        raise ArtifactError(f"teacher and student have different labels: {teacher.labels[:5]} and {student.labels[:5]}")
    if not len(data):
        raise DataError("no texts to train on")


def _key(student: Variant, teacher: Variant | None, data: Workload, options: DistillOptions) -> str:
    parts = [student.digest, teacher.digest if teacher else None, data.digest, asdict(options)]
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


def _loss(soft: Logits | None, labels: Sequence[int], options: DistillOptions) -> Any:
    import torch

    targets = torch.tensor(labels)
    answers = None if soft is None else torch.from_numpy(soft)

    def loss(logits: Any, rows: Sequence[int]) -> Any:
        teacher = logits.detach() if answers is None else answers[rows]
        return distillation_loss(logits, teacher, targets[rows], options)

    return loss


def teacher_logits(teacher: Variant, texts: Sequence[str], work: Path, *, threads: int) -> Logits:
    """A teacher's logits, from the cache when it holds just these.

    Args:
        teacher: What answers.
        texts: The texts.
        work: Folder of the cache; the file's name is the hash of teacher and texts.
        threads: Threads to run with.

    Returns:
        Logits; shape [texts, labels].

    Raises:
        ArtifactError: The cached file is damaged or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load, save

    digest = hashlib.sha256(msgspec.json.encode([teacher.digest, list(texts)])).hexdigest()
    path = work / f"logits-{digest[:16]}.safetensors"
    if path.is_file():
        try:
            return _checked(load(path.read_bytes())["logits"], len(texts), path)
        except (SafetensorError, KeyError) as error:
            raise ArtifactError(f"{path}: damaged cache of logits: {error}; delete it") from error
    batch = TEACHER_BATCH if teacher.manifest.batch_invariant else 1
    logits = predict_logits(open_runtime(teacher, threads=threads), texts, batch=batch)
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({"logits": logits}))
    return logits


def _checked(logits: NDArray[np.float32], rows: int, path: Path) -> Logits:
    if len(logits) != rows:
        raise ArtifactError(f"{path}: {len(logits)} rows of logits for {rows} texts; delete it")
    return logits
