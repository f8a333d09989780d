"""What a student can learn from inside its teacher: hidden states, and relations between tokens.

Two losses, which may be weighted together, of one forward pass of both models over the same texts.

- *Hidden states*: mean squared difference between the teacher's embeddings and layers and linear projections, learned
  on the way, of the student's. Source: Jiao et al. 2020, "TinyBERT", transformer-layer and embedding-layer
  distillation. We differ in that one
  projection serves all layers, and in that the layers are those that the student was cut from.
- *Relations*: divergence between how tokens attend to each other by queries alone, by keys alone and by values alone,
  in the last layer. It needs no equal widths, and no equal numbers of heads. Source: Wang et al. 2021, "MiniLMv2:
  multi-head self-attention relation distillation". We differ in the number of relation heads: the
  largest that divides both widths and leaves each head at least `LEAST_HEAD` wide.

Teacher and student must cut texts into the same number of tokens; their vocabularies may number them differently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hasten.errors import ArtifactError, UsageError
from hasten.mixed_precision import products_in
from hasten.torch_training import TrainingSet

MOST_RELATION_HEADS = 48
LEAST_HEAD = 16
PARTS = re.compile(
    r"layers?\.\d+\.(?:.*\.)?(query|key|value|query_proj|key_proj|value_proj|q_lin|k_lin|v_lin|attn\.[qkv])$"
)
FUSED = re.compile(r"layers?\.\d+\..*?Wqkv$")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuideOptions:
    """How much a student looks inside its teacher before it learns the teacher's answers.

    Attributes:
        epochs: Passes over the training texts, at least 0; 0 looks at answers alone.
        hidden_weight: Weight of the hidden states' term, at least 0.
        relation_weight: Weight of the relations' term, at least 0.
        learning_rate: Peak of this stage's schedule, above 0.
    """

    epochs: float = 0.0
    hidden_weight: float = 0.0
    relation_weight: float = 1.0
    learning_rate: float = 4e-4

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UsageError: A value is out of range.
        """
        for name in ("epochs", "hidden_weight", "relation_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"guidance: {name} must be a number from 0, not {getattr(self, name):g}")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"--learning-rate must be a number above 0, not {self.learning_rate:g}")
        if self.epochs and not self.hidden_weight + self.relation_weight:
            raise UsageError("guidance needs a hidden or a relation weight above 0")


class Guide:
    """A teacher and a student side by side.

    Args:
        teacher: A transformers classifier.
        student: Another, which is trained.
        texts: The texts as the teacher takes them; the same rows as the student's.
        options: Which losses.
        layers: Which of the teacher's layers (from 0) each of the student's stands for.
        seed: Seed of what is learned beside the student.

    Attributes:
        trainee: What is trained: the student and, beside it, what is learned on the way and not kept.

    Raises:
        ArtifactError: The queries, keys and values of an architecture are not known.
    """

    def __init__(
        self, teacher: Any, student: Any, texts: TrainingSet, options: GuideOptions, layers: Sequence[int],
        *, seed: int = 0,
    ) -> None:  # fmt: skip
        import torch

        torch.manual_seed(seed)
        self._teacher, self._student, self._texts, self._options = teacher.eval(), student, texts, options
        self._layers = [0, *(layer + 1 for layer in layers)]  # hidden states begin with the embeddings
        self._widths = (teacher.config.hidden_size, student.config.hidden_size)
        self._seen: dict[str, dict[str, list[Any]]] = {"teacher": {}, "student": {}}
        self._handles: list[Any] = []
        self.trainee = torch.nn.ModuleDict({"student": student})
        if options.hidden_weight:
            self.trainee["projection"] = torch.nn.Linear(self._widths[1], self._widths[0], bias=False)
        if options.relation_weight:
            self._handles += _listen(teacher, self._seen["teacher"]) + _listen(student, self._seen["student"])

    def loss(self, inputs: dict[str, Any], rows: Sequence[int]) -> Any:
        """Loss of one batch.

        Args:
            inputs: As the student takes them; tensors of shape [batch, tokens].
            rows: Which rows of the texts these are.

        Returns:
            A scalar tensor.
        """
        import torch

        where = inputs["attention_mask"].device
        theirs = self._texts.inputs(rows, where)
        deep = bool(self._options.hidden_weight)
        with torch.no_grad():
            teacher = self._teacher.to(where)(**theirs, output_hidden_states=deep)
        student = self._student(**inputs, output_hidden_states=deep)
        mask = inputs["attention_mask"]
        found = torch.zeros((), device=mask.device)
        if deep:
            projected = [self.trainee["projection"](state) for state in student.hidden_states]
            wanted = [teacher.hidden_states[layer] for layer in self._layers]
            found = found + self._options.hidden_weight * hidden_loss(projected, wanted, mask)
        if self._options.relation_weight:
            heads = relation_heads(*self._widths)
            parts = [[_last(self._seen[who][part], mask) for who in ("teacher", "student")] for part in ("q", "k", "v")]
            value = sum(relation_loss(theirs_of, ours_of, mask, heads) for theirs_of, ours_of in parts)
            for seen in self._seen.values():
                seen.clear()
            found = found + self._options.relation_weight * value
        return found

    def end(self) -> None:
        """Stops listening."""
        for handle in self._handles:
            handle.remove()


def relation_heads(*widths: int) -> int:
    """How many relation heads both widths can be cut into."""
    shared, narrowest = math.gcd(*widths), min(widths)
    fitting = [n for n in range(1, MOST_RELATION_HEADS + 1) if shared % n == 0 and narrowest // n >= LEAST_HEAD]
    return max(fitting, default=1)


def hidden_loss(student: Sequence[Any], teacher: Sequence[Any], mask: Any) -> Any:
    """Mean squared difference of hidden states over tokens that are not padding.

    Args:
        student: Projected states by layer; tensors of shape [batch, tokens, hidden].
        teacher: The teacher's; same shapes.
        mask: 1 for tokens, 0 for padding; tensor of shape [batch, tokens].

    Returns:
        A scalar tensor, the mean over layers.
    """
    kept = mask.bool()
    losses = [
        ((ours.float() - theirs.float())[kept] ** 2).mean() for ours, theirs in zip(student, teacher, strict=True)
    ]
    return sum(losses) / len(losses)


def relation_loss(teacher: Any, student: Any, mask: Any, heads: int) -> Any:
    """Divergence of the student's relations from the teacher's, for one of queries, keys and values.

    Args:
        teacher: Vectors; tensor of shape [batch, tokens, teacher hidden].
        student: Vectors; tensor of shape [batch, tokens, student hidden].
        mask: 1 for tokens, 0 for padding; tensor of shape [batch, tokens].
        heads: Relation heads, a divisor of both widths.

    Returns:
        A scalar tensor: KL(teacher || student), the mean over heads and tokens.
    """
    from torch.nn import functional

    wanted, found = _relations(teacher, mask, heads), _relations(student, mask, heads)
    divergence = functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    rows = mask.bool()[:, None, :].expand(divergence.shape)
    return divergence[rows].mean()


def _relations(vectors: Any, mask: Any, heads: int) -> Any:
    """Log-probabilities of each token's relation to the others; shape [batch, heads, tokens, tokens]."""
    batch, tokens, width = vectors.shape
    cut = vectors.float().reshape(batch, tokens, heads, width // heads).transpose(1, 2)
    with products_in("fp32", vectors.device.type):
        scores = cut @ cut.transpose(-1, -2) / math.sqrt(width // heads)
    return scores.masked_fill(~mask.bool()[:, None, None, :], -1e4).log_softmax(-1)


def _listen(model: Any, seen: dict[str, list[Any]]) -> list[Any]:
    """Keeps the queries, keys and values that the last layer computes, by letter, call by call; handles to end it."""
    fused = [module for name, module in model.named_modules() if FUSED.search(name)]
    if fused:

        def keep_parts(_module: Any, _inputs: Any, output: Any) -> None:
            for letter, part in zip("qkv", output.chunk(3, dim=-1), strict=True):
                seen.setdefault(letter, []).append(part)

        return [fused[-1].register_forward_hook(keep_parts)]
    named = [(match[1], module) for name, module in model.named_modules() if (match := PARTS.search(name))]
    last = {name.removeprefix("attn.")[0]: module for name, module in named}
    if set(last) != set("qkv"):
        raise ArtifactError(
            f"where {type(model).__name__} computes queries, keys and values is not known; "
            "use hidden states, or answers alone"
        )
    return [module.register_forward_hook(partial(_keep, seen, letter)) for letter, module in last.items()]


def _keep(seen: dict[str, list[Any]], letter: str, _module: Any, _inputs: Any, output: Any) -> None:
    seen.setdefault(letter, []).append(output)


def _last(calls: Sequence[Any], mask: Any) -> Any:
    """What was computed last of the texts: DeBERTa then puts its table of positions through the same weights."""
    return [output for output in calls if output.shape[:2] == mask.shape][-1]
