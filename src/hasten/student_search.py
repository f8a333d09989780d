"""Which student? Its shape is chosen from latencies measured on this machine before anything is trained.

Candidate shapes, from the smallest up until one is clearly too slow, are built with random weights, exported and
quantized as they would be served, and timed against the baseline in one interleaved run on texts of the user's own
length distribution.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hasten.budget import Budget
from hasten.errors import HastenError
from hasten.intervals import median_ratio
from hasten.measurement import Latency, this_host
from hasten.onnx_export import export
from hasten.profiling import ProfileOptions, time_only
from hasten.quantization import quantize
from hasten.report import ShapeRow
from hasten.students import Shape, candidate_shapes, init_student, largest_fitting, parse_shapes, shape_of
from hasten.variant import Variant
from hasten.workload import random_rows
from hasten.workshop import Workshop, make_key

TABLE = "shapes with intervals"
HEADROOM_RATIO = 1.15
CLEARLY_RATIO = 1.3
SHAPE_SAMPLES = 500
CALIBRATION_TEXTS = 8  # of random weights: any ranges will do
GLANCE_SAMPLES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search for a shape depends on.

    Attributes:
        baseline: What the budget's speed-up is over.
        source: The torch variant that students are cut from; often the baseline itself.
        texts: The texts to time on, of the user's own lengths; at least one.
        budget: What must be met.
        options: How to measure.
    """

    baseline: Variant
    source: Variant
    texts: tuple[str, ...]
    budget: Budget
    options: ProfileOptions


def measured_shapes(
    baseline: Variant, source: Variant, texts: Sequence[str], shapes: str | None, budget: Budget,
    options: ProfileOptions, folder: Path,
) -> list[ShapeRow]:  # fmt: skip
    """The table of shapes for someone who only wants to know.

    Args:
        baseline: What the budget's speed-up is over; a torch variant.
        source: The torch variant that students would be cut from.
        texts: Texts of the user's own lengths.
        shapes: Candidates such as `2x128,3x384`; None takes a catalogue.
        budget: What must be met.
        options: How to measure.
        folder: Where to build them.

    Returns:
        As `latency_table`.
    """
    search = Search(baseline=baseline, source=source, texts=tuple(texts), budget=budget, options=options)
    shop = Workshop(folder)
    with shop.held():
        return latency_table(search, shapes_to_measure(source, shapes), shop)


def shapes_to_measure(source: Variant, shapes: str | None) -> list[Shape]:
    """The candidates that were asked for, or those of the catalogue that a model can be cut to."""
    largest = shape_of(source)
    return candidate_shapes(largest) if shapes is None else parse_shapes(shapes, largest)


def latency_table(search: Search, shapes: Sequence[Shape], workshop: Workshop) -> list[ShapeRow]:
    """Measures shapes before training and marks the one to train.

    Args:
        search: Models, texts, budget and measuring options.
        shapes: The candidates.
        workshop: Where to build them; the table is kept there.

    Returns:
        A row a shape, smallest first. The chosen one is the largest that fits the latency budget with headroom, or
        the fastest if none does.

    Raises:
        HastenError: There are no shapes.
    """
    if not shapes:
        raise HastenError(
            "the model is too small for a student: no shape is smaller; the budget needs a faster machine"
        )
    models = (search.baseline.digest, search.source.digest)
    host = this_host()
    machine = (host.cpu, host.cores, host.instructions)
    key = make_key(TABLE, *models, search.texts, search.budget, search.options, SHAPE_SAMPLES, list(shapes), machine)
    return workshop.cached("shapes", key, list[ShapeRow], lambda: _measure(search, shapes, workshop))


def _measure(search: Search, shapes: Sequence[Shape], workshop: Workshop) -> list[ShapeRow]:
    rows = random_rows(len(search.texts), SHAPE_SAMPLES, seed=search.options.seed)
    texts = [search.texts[row] for row in rows]
    shutil.rmtree(workshop.work / "shapes", ignore_errors=True)  # of a run that was killed while it removed them
    untrained = _worth_timing(search, shapes, texts[:GLANCE_SAMPLES], workshop)
    baseline, *latencies = time_only([search.baseline, *untrained.values()], texts, search.options)
    table = [
        _row(search.budget, shape, variant, latency, baseline)
        for (shape, variant), latency in zip(untrained.items(), latencies, strict=True)
    ]
    shutil.rmtree(workshop.work / "shapes")
    largest = largest_fitting([(shape, row.fits) for shape, row in zip(untrained, table, strict=True)])
    best = min(table, key=lambda row: row.p50_ms.value).name if largest is None else str(largest)
    return [replace(row, chosen=row.name == best) for row in table]


def _worth_timing(
    search: Search, shapes: Sequence[Shape], texts: Sequence[str], workshop: Workshop
) -> dict[Shape, Variant]:
    """Builds shapes from the smallest up, without those that have all of one that a glance showed to be too slow."""
    (baseline,) = time_only([search.baseline], texts, search.options)
    built, slow = dict[Shape, Variant](), list[Shape]()
    for shape in shapes:
        if any(shape.holds(other) for other in slow):
            continue
        built[shape] = untrained(search.source, shape, workshop.work / "shapes", texts)
        (latency,) = time_only([built[shape]], texts, search.options)
        if clearly_slow(search.budget, latency, baseline):
            slow.append(shape)
    return built


def untrained(source: Variant, shape: Shape, place: Path, texts: Sequence[str]) -> Variant:
    """A student with random weights, as it would be served.

    Args:
        source: The torch variant that students are cut from.
        shape: The student's shape.
        place: A folder for the variants that lead to it.
        texts: Real texts; some of them are calibrated on.

    Returns:
        The INT8 variant.
    """
    random = init_student(source, shape, place / f"{shape}-torch", name=f"{shape}-torch", start="random")
    graph = export(random, place / f"{shape}-fp32", name=f"{shape}-fp32")
    some = list(dict.fromkeys(texts))[:CALIBRATION_TEXTS]
    return quantize(graph, place / f"{shape}-int8", name=f"{shape}-int8", texts=some)


def clearly_slow(budget: Budget, latency: Latency, baseline: Latency) -> bool:
    """Whether the median alone rules a shape out: the p99 of a glance would be that of one stall.

    Args:
        budget: What must be met.
        latency: Of the shape, a few samples.
        baseline: Of the baseline.

    Returns:
        True if the median misses the budget by more than three tenths.
    """
    p50_ms = latency.percentile(50).value / CLEARLY_RATIO
    return (budget.p99_ms is not None and p50_ms > budget.p99_ms) or (
        budget.speedup is not None and baseline.percentile(50).value / p50_ms < budget.speedup
    )


def _fits(budget: Budget, latency: Latency, baseline: Latency, headroom: float) -> bool:
    """Whether latencies, made worse by a factor, still meet the budget."""
    p50_ms, p99_ms = latency.percentile(50).value, latency.percentile(99).value
    speedup = baseline.percentile(50).value / p50_ms
    return (budget.p99_ms is None or p99_ms * headroom <= budget.p99_ms) and (
        budget.speedup is None or speedup >= budget.speedup * headroom
    )


def _row(budget: Budget, shape: Shape, variant: Variant, latency: Latency, baseline: Latency) -> ShapeRow:
    return ShapeRow(
        name=str(shape), layers=shape.layers, hidden=shape.hidden, parameters=variant.manifest.parameters.total,
        p50_ms=latency.percentile(50), p99_ms=latency.percentile(99),
        speedup=median_ratio(baseline.samples_ms, latency.samples_ms),
        fits=_fits(budget, latency, baseline, HEADROOM_RATIO), chosen=False,
    )  # fmt: skip
