"""Distillation: a student learns its teacher's answers, and before that, if asked for, looks inside its teacher.

The first stage is `hasten.guidance`'s, over hidden states and relations; the second `hasten.teaching`'s, over answers,
on the training texts and on a transfer set of texts without labels (`hasten.transfer`). Where a machine has several
GPUs, all of them train.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

from hasten.errors import ArtifactError, DataError, UsageError
from hasten.golden import finish
from hasten.guidance import Guide
from hasten.measurement import library_versions
from hasten.rounding import rounded_products
from hasten.several_devices import Order, devices, train_together
from hasten.teaching import DistillOptions, Lesson, answers_loss, teacher_logits, watch_accuracy
from hasten.torch_runtime import load_torch_model
from hasten.torch_training import Progress, TrainingSet, device, fit
from hasten.variant import StepRecord, Variant, building, check_place, copy_configuration, open_variant

VERSIONED = ("torch", "transformers")


def distill(
    student: Variant,
    out: Path,
    options: DistillOptions | None = None,
    *,
    name: str,
    lesson: Lesson,
    work: Path,
    progress: Progress | None = None,
) -> Variant:
    """Trains a student on a teacher's logits and the true labels.

    Args:
        student: A torch variant to start from.
        out: The folder to make.
        options: How; the defaults if None.
        name: The new variant's name.
        lesson: Texts, labels and teacher.
        work: Folder for the cached logits and the checkpoints.
        progress: Called with the steps done and the steps in all, a stage after the other.

    Returns:
        The trained torch variant. Its step's facts hold the accuracy on the watched texts as it went, by steps done.

    Raises:
        UsageError: Hidden states are asked for and the teacher's layers do not go with the student's.
        ArtifactError: The student is no torch variant, teacher and student have different labels, or the student is to
            look inside a teacher that cuts texts into other tokens.
        DataError: There are no texts, or the teacher is worse than always giving the most frequent label.
        HastenError: The loss is NaN, or one of the processes of several GPUs ended.
        UsageError: Something else than a variant stands where the folder shall be.
    """
    check_place(out)
    options = options or DistillOptions()
    if lesson.teacher is None:
        options = replace(options, soft_weight=0.0, guide=replace(options.guide, epochs=0.0))
    _check(student, lesson)
    if (count := devices()) > 1:
        if lesson.teacher is not None:  # asked once, and not by every process
            teacher_logits(lesson.teacher, lesson.texts, work, threads=options.train.threads)
        order = Order(student=student, out=out, options=options, name=name, lesson=lesson, work=work)
        train_together(order, count, progress)
        return open_variant(out)
    model, facts = teach(student, options, name=name, lesson=lesson, work=work, progress=progress)
    return keep(model, student, out, options, name=name, lesson=lesson, facts=facts)


def teach(
    student: Variant, options: DistillOptions, *, name: str, lesson: Lesson, work: Path, progress: Progress | None
) -> tuple[Any, dict[str, Any]]:
    """Trains in this process, alone or as one of several.

    Args:
        student: As of `distill`, as are the errors.
        options: How.
        name: The new variant's name.
        lesson: Texts, labels and teacher.
        work: Folder for the cached logits and the checkpoints.
        progress: Called with the steps done and the steps in all.

    Returns:
        The trained model, and the facts of its step.
    """
    import torch

    made_by = library_versions((*VERSIONED, "hasten"))  # a checkpoint of another version is not gone on from
    parts = [student.digest, *lesson.identity, asdict(options), made_by]
    key = hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()
    torch.set_num_threads(options.train.threads)  # whatever ran before, or did not since it was on disk
    model = load_torch_model(student)
    data = TrainingSet.of(student, model, lesson.texts)
    if options.guide.epochs:
        _look_inside(model, data, lesson, options, work / f"{name}.guide.safetensors", key, progress)
    bits = options.rounding_bits
    with rounded_products(model.to(device()), data, weight_bits=bits) if bits else nullcontext():
        seen = fit(
            model, data, answers_loss(model, lesson, options, work, threads=options.train.threads), options.train,
            checkpoint=work / f"{name}.checkpoint.safetensors", key=key, progress=progress,
            watch=watch_accuracy(student, model, lesson.watched),
        )  # fmt: skip
    facts = lesson.facts
    if seen:
        facts["watched_accuracy"] = {str(step): round(share, 4) for step, share in seen}
    return model, facts


def keep(
    model: Any, student: Variant, out: Path, options: DistillOptions, *, name: str, lesson: Lesson,
    facts: dict[str, Any],
) -> Variant:  # fmt: skip
    """Writes what was trained as a variant; arguments as of `distill` and from `teach`."""
    step = StepRecord(
        name="distill" if lesson.teacher else "train",
        parent=student.digest,
        options=asdict(options) | {"teacher": lesson.teacher.digest if lesson.teacher else None},
        versions=library_versions(VERSIONED),
        facts=facts,
    )
    with building(out) as draft:
        copy_configuration(student, draft)
        model.save_pretrained(draft)
        sealed = finish(draft, replace(student.manifest, name=name, step=step))
    return Variant(path=out.resolve(), manifest=sealed)


def _check(student: Variant, lesson: Lesson) -> None:
    teacher = lesson.teacher
    if student.manifest.format != "torch":
        raise ArtifactError(f"{student.path}: format is {student.manifest.format}; only a torch variant can be trained")
    if teacher is not None and teacher.labels != student.labels:
        raise ArtifactError(f"teacher and student have different labels: {teacher.labels[:5]} and {student.labels[:5]}")
    if not len(lesson.data):
        raise DataError("no texts to train on")


def _look_inside(
    model: Any, data: TrainingSet, lesson: Lesson, options: DistillOptions, checkpoint: Path, key: str,
    progress: Progress | None,
) -> None:  # fmt: skip
    """The first stage: hidden states and relations."""
    if lesson.guide is None or lesson.guide.manifest.format != "torch":
        raise UsageError("to look inside a teacher, its torch variant is needed")
    if options.guide.hidden_weight and len(lesson.layers) != model.config.num_hidden_layers:
        raise UsageError(
            f"hidden states are compared layer by layer: {model.config.num_hidden_layers} layers of the student, "
            f"{len(lesson.layers)} of the teacher named for them; a student must not be deeper than its teacher"
        )
    teacher = load_torch_model(lesson.guide)
    theirs = TrainingSet.of(lesson.guide, teacher, lesson.texts)
    if [len(e) for e in theirs.encodings] != [len(e) for e in data.encodings]:
        raise ArtifactError(
            f"{lesson.guide.name} and its student cut texts into different tokens, so that one's hidden states say "
            "nothing about the other's; use answers alone (no guidance)"
        )
    guide = Guide(teacher, model, theirs, options.guide, lesson.layers, seed=options.train.seed)
    train = replace(options.train, epochs=options.guide.epochs, learning_rate=options.guide.learning_rate)
    fit(guide.trainee, data, guide.loss, train, checkpoint=checkpoint, key=key, progress=progress)
    guide.end()
