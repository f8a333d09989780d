"""Training in bfloat16: what stays fp32, how near it comes, and where it is taken."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import LABELS, labelled_rows
from hasten import cli_options, mixed_precision
from hasten.checkpoint import import_checkpoint
from hasten.cli_options import precision_of
from hasten.distillation import distill
from hasten.errors import MissingExtraError, UsageError
from hasten.guidance import Guide, GuideOptions
from hasten.mixed_precision import Precision, native_precision, products_in, step_in
from hasten.students import stand_for
from hasten.teaching import DistillOptions, Lesson, answers_loss
from hasten.torch_runtime import load_torch_model
from hasten.torch_training import TrainingSet, TrainOptions, fit
from hasten.variant import Variant
from hasten.workload import Workload

ROWS = labelled_rows(24, seed=5)
DATA = Workload(
    name="train", source="memory", texts=tuple(text for text, _ in ROWS),
    labels=tuple(LABELS.index(label) for _, label in ROWS),
)  # fmt: skip
NEAR = 0.05  # bfloat16 keeps 8 bits: errors of 2^-9 a product, over some layers


@pytest.fixture(scope="module")
def bert(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return import_checkpoint(str(checkpoint("bert")), tmp_path_factory.mktemp("bert") / "torch-fp32")


def trained(bert: Variant, place: Path, precision: Precision) -> tuple[dict[str, Any], list[float]]:
    """Weights after some steps, and the losses of the steps."""
    model, losses = load_torch_model(bert), list[float]()
    inner = answers_loss(model, Lesson(data=DATA, teacher=None), DistillOptions(soft_weight=0.0), place, threads=1)

    def loss(inputs: dict[str, Any], rows: Any) -> Any:
        value = inner(inputs, rows)
        losses.append(float(value.detach()))
        assert str(value.dtype) == "torch.float32"
        return value

    options = TrainOptions(epochs=4, batch=8, learning_rate=1e-3, precision=precision)
    fit(model, TrainingSet.of(bert, model, DATA.texts), loss, options, checkpoint=place / precision, key="key")
    return model.state_dict(), losses


def test_training_in_bfloat16_goes_the_way_of_fp32_with_weights_in_fp32(bert: Variant, tmp_path: Path) -> None:
    (plain, expected), (mixed, found) = (trained(bert, tmp_path, precision) for precision in ("fp32", "bf16"))
    assert found != expected  # the products did run in another format
    assert found == pytest.approx(expected, rel=NEAR)
    assert found[-1] < found[0]
    assert {str(weight.dtype) for weight in mixed.values() if weight.is_floating_point()} == {"torch.float32"}
    start = load_torch_model(bert).state_dict()
    moved, apart = (
        np.sqrt(sum(float((plain[name] - other[name]).square().sum()) for name in plain if "weight" in name))
        for other in (start, mixed)
    )
    assert 0 < apart < moved / 2


def test_gradients_in_bfloat16_point_where_those_of_fp32_do(bert: Variant) -> None:
    import torch

    directions: list[Any] = []
    for precision in ("fp32", "bf16"):
        model = load_torch_model(bert)
        inputs = TrainingSet.of(bert, model, DATA.texts).inputs(range(8))
        with products_in(precision, "cpu"):
            logits = model(**inputs).logits
        assert logits.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        torch.nn.functional.cross_entropy(logits.float(), torch.tensor(DATA.labels[:8])).backward()
        directions.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]))
    assert float(torch.nn.functional.cosine_similarity(*directions, dim=0)) > 1 - NEAR


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_a_look_inside_the_teacher_costs_the_same_in_both(bert: Variant, weights: tuple[float, float]) -> None:
    import torch

    options = GuideOptions(epochs=1, hidden_weight=weights[0], relation_weight=weights[1])
    found: list[float] = []
    for precision in ("fp32", "bf16"):
        teacher, student = load_torch_model(bert), load_torch_model(bert)
        with torch.no_grad():
            for weight in student.parameters():
                weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        texts = TrainingSet.of(bert, student, DATA.texts)
        guide = Guide(teacher, student, texts, options, stand_for(bert, bert))
        with products_in(precision, "cpu"):
            value = guide.loss(texts.inputs(range(8)), range(8))
        assert value.dtype == torch.float32
        value.backward()
        guide.end()
        found.append(float(value.detach()))
    assert found[1] == pytest.approx(found[0], rel=NEAR)


def test_what_was_killed_ends_the_same_in_bfloat16(bert: Variant, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    options = DistillOptions(train=TrainOptions(epochs=2, batch=8, checkpoint_s=0.0, precision="bf16"))

    def run(name: str, kill_at: int | None = None) -> Variant:
        def progress(step: int, _total: int) -> None:
            if step == kill_at:
                raise KilledError

        return distill(bert, tmp_path / name, options, name="student", lesson=Lesson(data=DATA, teacher=None),
                       work=tmp_path / f"{name}.work", progress=progress)  # fmt: skip

    with pytest.raises(KilledError):
        run("killed", kill_at=3)
    assert run("killed").manifest.files == run("whole").manifest.files


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(("avx2", "avx512f"), "fp32"), (("avx512_bf16",), "bf16"), (("avx512f", "amx_bf16"), "bf16"), ((), "fp32")],
)
def test_bfloat16_is_for_hardware_that_multiplies_it(
    flags: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_precision, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(cli_options, "device", lambda: "cpu")
    assert native_precision("cpu") == expected
    assert precision_of(None) == expected
    assert (precision_of("fp32"), precision_of("bf16")) == ("fp32", "bf16")


def test_a_format_that_there_is_none_of_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--precision is 'fp32' or 'bf16', not 'fp16'"):
        precision_of("fp16")


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match="optimize"):
        precision_of(None)


def test_integers_are_not_trained_in_bfloat16() -> None:
    with pytest.raises(UsageError, match="trained in fp32, not bf16"):
        replace(DistillOptions(train=TrainOptions(precision="bf16")), rounding_bits=8)


@pytest.mark.parametrize(
    ("precision", "tokens", "plain"),
    [("bf16", 16, True), ("bf16", 128, True), ("bf16", 129, False), ("fp32", 16, False)],
)
def test_short_texts_in_bfloat16_take_no_fused_attention(
    bert: Variant, precision: Precision, tokens: int, plain: bool
) -> None:
    import torch

    model = load_torch_model(bert)
    ids = torch.ones((2, min(tokens, model.config.max_position_embeddings)), dtype=torch.int64)
    with torch.profiler.profile() as seen, step_in(precision, "cpu", tokens):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    fused = any("flash_attention" in event.key for event in seen.key_averages())
    assert fused != plain
