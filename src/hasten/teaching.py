"""What a student is taught with: texts, labels where there are any, and a teacher's answers; and the loss over them.

Source: Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", section 2. We differ in that the
teacher's logits are computed once, cached and hashed, so the teacher runs over each text a single time. The squared
difference of logits, the other objective, is that of Ba and Caruana 2014, "Do deep nets really need to be deep?".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from hasten.answers import require_better_than_majority
from hasten.errors import ArtifactError, UsageError
from hasten.files import write_atomically
from hasten.guidance import GuideOptions
from hasten.measurement import Quality
from hasten.runtime import Logits, open_runtime, predict_logits
from hasten.torch_training import TrainingSet, TrainOptions, Watch, device
from hasten.variant import Variant
from hasten.workload import Workload, some_rows

TEACHER_BATCH = 16
CACHED_TEXTS = 2048
WATCHED_ROWS = 400
UNLABELLED = -1
Objective = Literal["kl", "mse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions:
    """How to distil.

    Attributes:
        objective: How the teacher's answers are matched: `kl`, the divergence of softened distributions, or `mse`, the
            mean squared difference of logits.
        temperature: Softens both distributions of `kl`, above 0.
        soft_weight: Weight of the teacher's term, 0 to 1; the true labels have the rest, where a text has one.
        guide: How much the student looks inside its teacher first.
        train: How to train.
        rounding_bits: Bits that weights are rounded to while the student learns from answers, 7 or 8, so that it bears
            INT8; None rounds nothing. See `hasten.rounding`.
        force: Whether to learn even from a teacher that is worse than always giving the most frequent label.
    """

    objective: Objective = "kl"
    temperature: float = 2.0
    soft_weight: float = 0.9
    guide: GuideOptions = field(default_factory=GuideOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    rounding_bits: Literal[7, 8] | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UsageError: A value is out of range.
        """
        if not self.temperature > 0:
            raise UsageError(f"the temperature must be above 0, not {self.temperature}")
        if not 0 <= self.soft_weight <= 1:
            raise UsageError(f"the soft weight is a share, 0 to 1, not {self.soft_weight}")
        if self.rounding_bits and self.train.precision != "fp32":
            raise UsageError(f"products that are rounded to integers are trained in fp32, not {self.train.precision}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What a student is taught with.

    Attributes:
        data: Training texts with labels.
        transfer: Texts without labels, which only a teacher can use.
        teacher: What gives the logits, in any format; None trains on the labels alone, as a control.
        guide: The torch variant to look inside, if the options ask for that.
        layers: Which of the guide's layers (from 0) each of the student's stands for, for hidden states.
        watched: Labelled texts that are no training texts, to follow the accuracy on.
    """

    data: Workload
    transfer: tuple[str, ...] = ()
    teacher: Variant | None
    guide: Variant | None = None
    layers: tuple[int, ...] = ()
    watched: Workload | None = None

    @property
    def texts(self) -> list[str]:
        """All texts to learn from, those with labels first."""
        return [*self.data.texts, *(self.transfer if self.teacher else ())]

    @property
    def labels(self) -> list[int]:
        """Label ids of `texts`, `UNLABELLED` where there is none."""
        return [*self.data.labels] + [UNLABELLED] * (len(self.texts) - len(self.data))

    @property
    def identity(self) -> list[Any]:
        """What a key must hold of it."""
        digest = hashlib.sha256(msgspec.json.encode(self.transfer)).hexdigest() if self.transfer else None
        used = [part.digest if part else None for part in (self.teacher, self.guide, self.watched)]
        return [self.data.digest, digest, *used, self.layers]

    @property
    def facts(self) -> dict[str, Any]:
        """What a step's record tells of it."""
        found: dict[str, Any] = {"texts": len(self.data), "data": self.data.digest}
        if self.teacher is not None:
            who = f"{self.teacher.name} ({self.teacher.manifest.precision})"
            found |= {"transfer_texts": len(self.transfer), "answers_from": who}
        return found


def distillation_loss(student: Any, teacher: Any, labels: Any, options: DistillOptions) -> Any:
    """The weighted sum of the distance to the teacher's answers and the cross-entropy with the labels.

    Args:
        student: Logits; tensor of shape [batch, labels].
        teacher: Logits; tensor of shape [batch, labels].
        labels: Label ids, `UNLABELLED` where there is none; tensor of shape [batch].
        options: Objective, temperature and weights.

    Returns:
        A scalar tensor: w D(teacher, student) + (1 - w) CE(student, labels), where D is
        T² KL(softmax(teacher / T) || softmax(student / T)) or the mean squared difference, and CE is summed over the
        texts with labels and divided by all.
    """
    from torch.nn import functional

    hard = functional.cross_entropy(student, labels, ignore_index=UNLABELLED, reduction="sum") / len(labels)
    if options.objective == "mse":
        soft = functional.mse_loss(student, teacher)
    else:
        soft = options.temperature**2 * functional.kl_div(
            (student / options.temperature).log_softmax(-1),
            (teacher / options.temperature).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
    return options.soft_weight * soft + (1 - options.soft_weight) * hard


def answers_loss(
    model: Any, lesson: Lesson, options: DistillOptions, work: Path, *, threads: int
) -> Callable[[dict[str, Any], Sequence[int]], Any]:
    """The loss of a step, as `fit` takes it.

    Args:
        model: What is trained; gives `logits`.
        lesson: Texts, labels, and who answers.
        options: Objective and weights.
        work: Folder of the cached logits.
        threads: Threads for the teacher.

    Returns:
        From the inputs and the rows of a step to a scalar tensor.

    Raises:
        DataError: The teacher is worse than always giving the most frequent label, and nothing is forced.
    """
    import torch

    teacher = lesson.teacher
    soft = None if teacher is None else teacher_logits(teacher, lesson.texts, work, threads=threads)
    if soft is not None and teacher is not None and not options.force:
        answered = tuple(map(int, soft[: len(lesson.data)].argmax(-1)))
        quality = Quality(predictions=answered, expected=lesson.data.labels)
        require_better_than_majority(quality, teacher.labels, who=teacher.name, rows="training rows")
    targets = torch.tensor(lesson.labels)
    answers = None if soft is None else torch.from_numpy(soft)

    def loss(inputs: dict[str, Any], rows: Sequence[int]) -> Any:
        logits = model(**inputs).logits.float()
        wanted = logits.detach() if answers is None else answers[rows].to(logits.device)
        return distillation_loss(logits, wanted, targets[rows].to(logits.device), options)

    return loss


def watch_accuracy(student: Variant, model: Any, watched: Workload | None) -> Watch | None:
    """Follows the accuracy on labelled texts that are not trained on.

    Args:
        student: The variant that `model` was loaded from.
        model: What is trained.
        watched: The texts; None follows nothing.

    Returns:
        What to look at now and then.
    """
    if watched is None:
        return None
    few = watched.take(some_rows(len(watched), WATCHED_ROWS, seed=0))
    rows = range(len(few))
    texts = TrainingSet.of(student, model, few.texts)

    def accuracy() -> float:
        right = 0
        for start in range(0, len(few), TEACHER_BATCH):
            batch = list(rows[start : start + TEACHER_BATCH])
            answers = model(**texts.inputs(batch, device())).logits.argmax(-1).tolist()
            right += sum(answer == few.labels[row] for answer, row in zip(answers, batch, strict=True))
        return right / len(few)

    return Watch(look=accuracy)


def teacher_logits(teacher: Variant, texts: Sequence[str], work: Path, *, threads: int) -> Logits:
    """A teacher's logits, part by part from the cache where it holds just these.

    Args:
        teacher: What answers.
        texts: The texts.
        work: Folder of the cache: a file for each `CACHED_TEXTS` texts, its name the hash of teacher and texts.
        threads: Threads to run with.

    Returns:
        Logits; shape [texts, labels].

    Raises:
        ArtifactError: A cached file is damaged or from another teacher or other texts.
    """
    from safetensors.numpy import save

    work.mkdir(parents=True, exist_ok=True)
    batch = answers_at_once(teacher)
    runtime, parts = None, list[Logits]()
    for part, digest, path in _parts(teacher, texts, work):
        if path.is_file():
            parts.append(_cached(path, digest, len(part)))
            continue
        runtime = runtime or open_runtime(teacher, threads=threads)
        parts.append(predict_logits(runtime, part, batch=batch))
        write_atomically(path, save({"logits": parts[-1]}, metadata={"digest": digest}))
    return np.concatenate(parts)


def answers_at_once(teacher: Variant) -> int:
    """How many texts a teacher answers in one inference: one, where company could change an answer."""
    return TEACHER_BATCH if teacher.manifest.batch_invariant else 1


def answered_texts(teacher: Variant, texts: Sequence[str], work: Path) -> int:
    """How many of the texts a teacher need not answer again, whatever texts come after them.

    Args:
        teacher: What answers.
        texts: The texts.
        work: Folder of the cache.

    Returns:
        Texts in whole parts that are cached.
    """
    parts = [part for part, _, path in _parts(teacher, texts, work) if path.is_file()]
    return sum(len(part) for part in parts if len(part) == CACHED_TEXTS)


def _parts(teacher: Variant, texts: Sequence[str], work: Path) -> Generator[tuple[list[str], str, Path]]:
    """The texts by parts, each with the hash of teacher and texts and the file of its logits."""
    for start in range(0, len(texts), CACHED_TEXTS):
        part = list(texts[start : start + CACHED_TEXTS])
        digest = hashlib.sha256(msgspec.json.encode([teacher.digest, part])).hexdigest()
        yield part, digest, work / f"logits-{digest[:16]}.safetensors"


def _cached(path: Path, digest: str, rows: int) -> Logits:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            found, logits = (file.metadata() or {}).get("digest"), file.get_tensor("logits")
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged cache of logits: {error}; delete it") from error
    if found != digest or len(logits) != rows:
        raise ArtifactError(f"{path}: a cache of another teacher's logits, or of other texts; delete it")
    return logits
