"""Which rows go together: a batch that no mate is late for, and that costs less than one row after the other.

Worked example: with `max_batch=8, max_padded_tokens=64`, rows of 20, 50, 24 and 3 tokens wait, and nothing is known of
costs. The oldest goes (20); 50 would make 2 × 50 = 100 > 64 and stays; 24 makes 2 × 24 = 48 and goes; 3 would make
3 × 24 = 72 and stays. The next batch starts with the row of 50.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hasten.errors import UsageError
from hasten.predictions import Costs, NoCosts

GAIN = 0.95  # together must save at least a twentieth of what the joining row costs alone
NEVER = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How large a batch and the queue may grow.

    Attributes:
        max_batch: Most rows in a batch, at least 1.
        max_padded_tokens: Highest cost of a batch of several rows: rows × longest, at least 1. A longer row goes alone.
        max_queue: Most rows waiting for a worker, at least 1; those being computed do not count.
    """

    max_batch: int
    max_padded_tokens: int
    max_queue: int

    def __post_init__(self) -> None:
        """Refuses limits under which nothing could run."""
        for name in ("max_batch", "max_padded_tokens", "max_queue"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")


def take_batch(
    waiting_tokens: Sequence[int], limits: Limits, costs: Costs | None = None, left_s: Sequence[float] | None = None
) -> list[int]:
    """Chooses the next batch.

    The oldest row is always taken, so a row in place k waits for at most k batches, whatever arrives behind it. Younger
    rows follow in their order, passing over those that would make the padded batch too costly: above the limit, no
    cheaper than one after the other, or too slow for somebody's deadline.

    Args:
        waiting_tokens: Length of each waiting row, oldest first.
        limits: What the batch must keep to.
        costs: What batches take; None knows nothing.
        left_s: Seconds to each row's deadline; None has none.

    Returns:
        Ascending positions in the queue; empty only if nothing waits.
    """
    costs, left_s = costs or NoCosts(), left_s or [NEVER] * len(waiting_tokens)
    taken: list[int] = []
    longest, soonest_s = 0, NEVER
    for position, tokens in enumerate(waiting_tokens):
        rows, length, hurry_s = len(taken) + 1, max(longest, tokens), min(soonest_s, left_s[position])
        if rows > limits.max_batch:
            break
        if taken:
            apart_s = costs.seconds(rows - 1, longest) + GAIN * costs.seconds(1, tokens)
            cheaper = rows * length <= limits.max_padded_tokens and costs.seconds(rows, length) <= apart_s
            if not cheaper or costs.bound(rows, length) > hurry_s:
                continue
        taken.append(position)
        longest, soonest_s = length, hurry_s
    return taken
