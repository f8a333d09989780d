"""Which of a teacher's layers a student starts from: those that change what passes through them most.

Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", on block
influence. We differ in that the first and the last layer have no place of their own: they are measured like the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hasten.errors import DataError
from hasten.torch_runtime import load_torch_model
from hasten.torch_training import TrainingSet
from hasten.variant import Variant
from hasten.workload import some_rows

MOST_TEXTS, BATCH = 128, 16


def layer_influences(teacher: Variant, texts: Sequence[str]) -> list[float]:
    """How much each layer changes the hidden states of real texts.

    Args:
        teacher: A torch variant.
        texts: Real texts, at least one; 128 of them are used.

    Returns:
        1 minus the mean cosine between what goes into a layer and what comes out of it, over all tokens; by layer.

    Raises:
        DataError: There are no texts.
    """
    import torch

    if not texts:
        raise DataError("layers are chosen by what they do to texts; none were given")
    torch.set_num_threads(1)  # sums are rounded alike whatever ran before
    model = load_torch_model(teacher)
    rows = some_rows(len(texts), MOST_TEXTS, seed=0)
    data = TrainingSet.of(teacher, model, [texts[row] for row in rows])
    kept: Any = 0.0
    tokens = 0
    with torch.inference_mode():
        for start in range(0, len(data.encodings), BATCH):
            inputs = data.inputs(range(start, min(start + BATCH, len(data.encodings))))
            real = inputs["attention_mask"].bool()
            states = _states(model, inputs)
            cosines = [
                torch.nn.functional.cosine_similarity(before, after, dim=-1)[real].sum()
                for before, after in pairwise(states)
            ]
            kept, tokens = kept + torch.stack(cosines), tokens + int(real.sum())
    return (1 - kept / tokens).tolist()


def _states(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """What goes into the first layer, and what comes out of each; ModernBERT normalises the last once more."""
    last: list[Any] = []
    norm = getattr(model.base_model, "final_norm", None)
    hook = norm.register_forward_pre_hook(lambda _, given: last.append(given[0])) if norm is not None else None
    states = list(model(**inputs, output_hidden_states=True).hidden_states)
    if hook is not None:
        hook.remove()
        states[-1:] = last
    return states


def most_influential(influences: Sequence[float], count: int) -> list[int]:
    """The layers (from 0) with the largest influence, in their order.

    Args:
        influences: By layer.
        count: How many, at most as many as there are.

    Returns:
        Their numbers.
    """
    ranked = sorted(range(len(influences)), key=lambda layer: -influences[layer])
    return sorted(ranked[:count])
