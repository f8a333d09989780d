"""A training loop that can be killed at any step and, on a CPU, goes on to the same weights.

Every random choice is drawn from the seed and the step's number, so a checkpoint is only weights, moments and a step.
It is one safetensors file, written aside and renamed. A GPU is used where there is one, several where this process is
one of `hasten.peers`, with the same model, texts and options. Non-goal: several machines.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from hasten.errors import ArtifactError, HastenError, MissingExtraError, UsageError
from hasten.files import write_atomically
from hasten.mixed_precision import Precision, step_in
from hasten.peers import peers
from hasten.tokenization import Encoding, TextEncoder, pad_token_id, padded
from hasten.torch_runtime import model_inputs
from hasten.variant import Variant

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
LAYER_NUMBER = re.compile(r"\.layers?\.(\d+)\.")
BUCKET_BATCHES = 16
MAX_GRADIENT_NORM = 1.0
PEER_SEED = 500_009  # apart from the steps' seeds, so that processes that train together drop out different neurons


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How to train.

    Attributes:
        epochs: Passes over the texts, above 0; a fraction ends within a pass.
        batch: Texts a step, at least 1.
        learning_rate: Peak of the schedule, above 0: linear warm-up, then linear decay to 0.
        warmup_share: Share of the steps for the warm-up, 0 to 1.
        weight_decay: AdamW's decoupled weight decay, at least 0.
        seed: Seed of batch order and dropout.
        threads: Threads to train with; other numbers of threads round differently.
        checkpoint_s: Seconds between checkpoints.
        dropout: Whether the model's dropout is active. A student that follows its teacher's logits does without;
            fine-tuning on few labels wants it.
        precision: Number format of the model's products; see `hasten.mixed_precision`. The command line takes what
            `native_precision` says.
        frozen_layers: How many of the lowest layers, with the embeddings below them, are not trained; 0 trains all.
    """

    epochs: float = 8
    batch: int = 32
    learning_rate: float = 4e-4
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0
    threads: int = 1
    checkpoint_s: float = 20.0
    dropout: bool = False
    precision: Precision = "fp32"
    frozen_layers: int = 0

    def __post_init__(self) -> None:
        """Checks what a command line can get wrong.

        Raises:
            UsageError: A value is out of range.
        """
        for name in ("epochs", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} must be a number above 0, not {getattr(self, name):g}")
        if self.batch < 1:
            raise UsageError(f"a step takes at least 1 text, not {self.batch}")


def batches(lengths: Sequence[int], options: TrainOptions) -> list[list[int]]:
    """The rows of every step, in order: each epoch a new permutation, with texts of similar length together.

    Args:
        lengths: Length of each text in tokens; shape [rows].
        options: Epochs, batch and seed.

    Returns:
        Row indices by step.
    """
    steps: list[list[int]] = []
    for epoch in range(math.ceil(options.epochs)):
        generator = np.random.default_rng((options.seed, epoch))
        steps += _epoch(generator.permutation(len(lengths)), lengths, options.batch, generator)
    return steps[: max(1, round(options.epochs * math.ceil(len(lengths) / options.batch)))]


def _epoch(order: Any, lengths: Sequence[int], batch: int, generator: np.random.Generator) -> list[list[int]]:
    steps: list[list[int]] = []
    for start in range(0, len(order), batch * BUCKET_BATCHES):
        bucket = sorted(order[start : start + batch * BUCKET_BATCHES].tolist(), key=lambda row: lengths[row])
        steps += [bucket[i : i + batch] for i in range(0, len(bucket), batch)]
    return [steps[i] for i in generator.permutation(len(steps))]


def learning_rate(step: int, total: int, options: TrainOptions) -> float:
    """Learning rate at a step (0 to total - 1): linear warm-up, then linear decay."""
    warmup = max(1, math.ceil(total * options.warmup_share))
    rising, falling = (step + 1) / warmup, (total - step) / max(1, total - warmup)
    return options.learning_rate * min(1.0, rising, falling)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """Tokenized texts to train on.

    Attributes:
        encodings: The texts; shape [rows].
        pad_id: Token id that fills up shorter rows.
        names: Which inputs the model takes, see `model_inputs`.
    """

    encodings: Sequence[Encoding]
    pad_id: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, variant: Variant, model: Any, texts: Sequence[str]) -> Self:
        """Texts as a variant's tokenizer and model take them."""
        return cls(encodings=TextEncoder(variant)(texts), pad_id=pad_token_id(variant), names=model_inputs(model))

    def inputs(self, rows: Sequence[int], where: Any = "cpu") -> dict[str, Any]:
        """The padded batch of some rows as torch tensors on a device."""
        import torch

        batch = padded([self.encodings[row] for row in rows], self.pad_id)
        return {name: torch.from_numpy(batch[name]).to(where) for name in self.names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Something to look at now and then while training.

    Attributes:
        look: Gives a number; must leave weights and random states alone.
        times: How often over the whole training.
    """

    look: Callable[[], float]
    times: int = 10


def device() -> str:
    """Where training runs.

    Returns:
        `cuda` if there is a GPU, else `cpu`.

    Raises:
        MissingExtraError: torch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError("torch", "optimize") from error

    return "cuda" if torch.cuda.is_available() else "cpu"


def fit(
    model: Any,
    data: TrainingSet,
    loss: Callable[[dict[str, Any], Sequence[int]], Any],
    options: TrainOptions,
    *,
    checkpoint: Path,
    key: str,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> list[tuple[int, float]]:
    """Trains a model in place.

    Args:
        model: A torch module; only weights with `requires_grad` are trained.
        data: The tokenized texts.
        loss: From the inputs and the rows of a step to a scalar tensor; called with the products in the wanted format.
        options: How to train.
        checkpoint: Where to keep the state; an existing one of the same key is continued, and it stays when done.
        key: Identity of everything the result depends on.
        progress: Called after each step with the steps done and the steps in all.
        watch: What to look at now and then.

    Returns:
        What was seen, by the first process if several train together: steps done and the number.

    Raises:
        HastenError: A loss is NaN or infinite.
    """
    import torch

    torch.set_num_threads(options.threads)
    model.to(device())
    _freeze(model, options.frozen_layers)
    steps = batches([len(e) for e in data.encodings], options)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    team = peers()
    looks = _moments_to_look(len(steps), watch.times) if watch and team.leads else set[int]()
    state, saved = _resume(model, optimizer, checkpoint, key), time.monotonic()
    team.wait()  # the checkpoint is read before one of them writes the next
    if state.step:
        log.info("continuing training at step %d", state.step)
    for step in range(state.step, len(steps)):
        model.train(options.dropout)
        torch.manual_seed(options.seed * 1_000_003 + step + team.rank * PEER_SEED)
        _set_rate(optimizer, learning_rate(step, len(steps), options))
        rows, weight = team.share(steps[step])
        inputs = data.inputs(rows, device())
        with step_in(options.precision, device(), inputs["input_ids"].shape[1]):
            value = loss(inputs, rows)
        _check_finite(float(value.detach()), step, rows)
        optimizer.zero_grad()
        (weight * value).backward()
        team.average(weights)
        torch.nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
        optimizer.step()
        done = step + 1
        if watch is not None and done in looks:
            state = replace(state, seen=[*state.seen, (done, _look(model, watch))])
        if team.leads and (time.monotonic() - saved > options.checkpoint_s or done == len(steps)):
            _save(model, optimizer, checkpoint, key, replace(state, step=done))
            saved = time.monotonic()
        if progress is not None:
            progress(done, len(steps))
    team.wait()
    model.eval().to("cpu")
    return state.seen


def _moments_to_look(steps: int, times: int) -> set[int]:
    return {round(steps * (i + 1) / times) for i in range(times)}


def _look(model: Any, watch: Watch) -> float:
    import torch

    model.eval()
    with torch.inference_mode():
        return watch.look()


def _freeze(model: Any, layers: int) -> None:
    if not layers:
        return
    for name, weight in model.named_parameters():
        found = LAYER_NUMBER.search(name)
        weight.requires_grad = not ("embeddings" in name or (found is not None and int(found[1]) < layers))


def _set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _check_finite(number: float, step: int, rows: Sequence[int]) -> None:
    if not math.isfinite(number):
        raise HastenError(
            f"the loss became {number} at step {step} (training rows {list(rows)[:8]} …); lower the learning rate"
        )


def _moments(model: Any, optimizer: Any) -> dict[str, Any]:
    """The optimizer's moments by the weight's name, and its step counts."""
    state: dict[str, Any] = {}
    for name, weight in model.named_parameters():
        for kind, tensor in optimizer.state.get(weight, {}).items():
            state[f"optimizer.{kind}.{name}"] = tensor
    return state


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """Where a training stands, besides weights and moments."""

    step: int = 0
    seen: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])


def _save(model: Any, optimizer: Any, path: Path, key: str, state: _State) -> None:
    from safetensors.torch import save

    tensors = {f"model.{name}": weight for name, weight in model.named_parameters()} | _moments(model, optimizer)
    data = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"key": key, "state": msgspec.json.encode(state).decode()}
    write_atomically(path, save(data, metadata=metadata))


def _resume(model: Any, optimizer: Any, path: Path, key: str) -> _State:
    """Restores a checkpoint of the same key; where to go on from, the start without one."""
    if not path.is_file():
        return _State()
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return _State()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged checkpoint: {error}; delete it to train from the start") from error
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[f"model.{name}"])
            kinds = {kind: tensors[f"optimizer.{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")
                     if f"optimizer.{kind}.{name}" in tensors}  # fmt: skip
            if kinds:
                optimizer.state[weight] = {kind: tensor.to(weight.device) for kind, tensor in kinds.items()}
    return msgspec.json.decode(metadata["state"], type=_State)
