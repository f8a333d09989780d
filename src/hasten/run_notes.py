"""What a reader should know of a run beside its figures, in sentences."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from statistics import mean, stdev

from hasten.intervals import Interval
from hasten.measurement import Measurement, speedup
from hasten.training_plan import TrainingPlan
from hasten.variant import IN_BFLOAT16, Variant
from hasten.workload import Workload, normalised

SEED_MARK = "-seed"  # before its number, in the name of a student from another seed than the first


def absent_labels(train: Workload, labels: Sequence[str]) -> Generator[str]:
    """Says which labels no training row has."""
    if absent := [label for number, label in enumerate(labels) if number not in set(train.labels)]:
        shown = ", ".join(map(repr, absent[:5])) + (" …" if len(absent) > 5 else "")
        yield f"{len(absent)} of {len(labels)} labels have no training row ({shown}): a student can hardly learn them."


def repeated_texts(test: Workload) -> Generator[str]:
    """Says how many test rows add little to what others tell."""
    if more := len(test) - len({normalised(text) for text in test.texts}):
        yield (
            f"{more:,} of the {len(test):,} test rows repeat the text of another. The intervals take rows to be "
            "independent, so they are too narrow by what these rows do not add."
        )


def time_spent(plan: TrainingPlan | None) -> Generator[str]:
    """Says how the minutes were spent."""
    if plan is not None:
        yield f"The {plan}."


def transfer_set(counts: dict[str, int]) -> Generator[str]:
    """Says what the transfer set is made of."""
    ways = {way: counts.get(way, 0) for way in ("unlabelled", "replace", "recombine", "truncate")}
    if sum(ways.values()):
        parts = ", ".join(f"{way} {number:,}" for way, number in ways.items() if number)
        yield (
            f"{sum(ways.values()):,} texts without labels for the teacher to answer ({parts}); left out: "
            f"{counts['guarded']:,} that equal or nearly equal a validation or test text."
        )


def spreads(measurements: Sequence[Measurement]) -> Generator[str]:
    """Says how much the accuracy of a student depends on its seed."""
    seeds: dict[str, list[float]] = defaultdict(list)
    for measurement in measurements:
        name = re.sub(rf"{SEED_MARK}\d+", "", measurement.variant)
        seeds[name].append(100 * measurement.quality.accuracy().value)
    for name, found in seeds.items():
        if len(found) > 1:
            each = ", ".join(f"{percent:.2f}" for percent in found)
            yield (
                f"{name} over {len(found)} seeds: accuracy {mean(found):.2f} % on average, standard deviation "
                f"{stdev(found):.2f} ({each})."
            )


def does_not_pay(variants: Sequence[Variant], measurements: Sequence[Measurement]) -> Generator[str]:
    """Says where INT8 or bfloat16 is not shown to be faster than what it was made from."""
    found = dict(zip((variant.digest for variant in variants), measurements, strict=True))
    for variant in variants:
        parent = found.get(variant.manifest.step.parent or "")
        if variant.manifest.precision != "fp32" and parent is not None:
            kind = "bfloat16" if variant.manifest.precision in IN_BFLOAT16 else "INT8"
            gain = speedup(parent, found[variant.digest])
            if gain.lower is None or gain.lower <= 1:
                yield (
                    f"{kind} does not pay on this CPU for {variant.name}: {gain.value:.2f} times the speed of "
                    f"{parent.variant}, which is not shown to be above 1."
                )


def loses_too_much(lost: Mapping[str, Interval], allowed_points: float) -> Generator[str]:
    """Says which variants are shown to lose more than allowed against what they were made from.

    Args:
        lost: Points of accuracy lost on the validation split, by the variant's name.
        allowed_points: What may be lost.

    Yields:
        A sentence for each.
    """
    for name, points in lost.items():
        if points.is_above(allowed_points):
            yield (
                f"{name} is shown to lose more than {allowed_points:g} points of accuracy on the validation split "
                f"against what it is in fp32: {points.value:.2f}, at least {points.lower:.2f}. It is chosen only where "
                "nothing else will do."
            )
