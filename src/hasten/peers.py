"""Processes that train one model together: each has a device, and a share of the texts of every step.

The gradients of the shares are averaged before each step, by Accelerate, so that all keep the same weights. Source: Li
et al. 2020, "PyTorch Distributed: experiences on accelerating data parallel training", section 3. We differ from its
wrapper in that gradients travel after the backward pass and not during it: the losses here ask parts of a model, whose
calls a wrapper would not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Peers:
    """The processes, as one of them sees them; alone, it is all of them.

    Attributes:
        rank: Which one this is, from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that keeps what is made."""
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> tuple[Sequence[int], float]:
        """This one's rows of a step, at least one, and what their mean counts in the mean over all processes.

        Args:
            rows: The step's rows, at least one.

        Returns:
            Some of the rows, and a weight: the weighted means, averaged over the processes, are the mean of all rows.
        """
        own = rows[self.rank :: self.count]
        return own or rows[:1], self.count * len(own) / len(rows)

    def average(self, weights: Sequence[Any]) -> None:
        """Makes the gradients of all processes their mean.

        Args:
            weights: Parameters; the same of them have a gradient in every process.
        """
        if self.count == 1:
            return
        import torch
        from accelerate.utils import reduce

        gradients = [weight.grad for weight in weights if weight.grad is not None]
        flat: Any = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def wait(self) -> None:
        """Returns when every process has come this far."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def join() -> None:
    """Joins those that torchrun started this process with; its device becomes the current one."""
    from accelerate import PartialState
    from torch import cuda

    PartialState(cpu=not cuda.is_available())  # else gradients of processes without GPUs would not be averaged


def peers() -> Peers:
    """Those that this process has joined."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return Peers()
    return Peers(distributed.get_rank(), distributed.get_world_size())
