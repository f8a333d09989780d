"""Whether intervals are as wide as this machine asks for: copies of one variant, measured as different ones are.

    python benchmarks/alike.py VARIANT BASELINE TEXTS [--copies 4] [--rounds 6] [--samples 1000]

In each round the baseline and some copies of the variant, each in a process of its own, are measured in one interleaved
run. What differs between copies is chance and the machine. Counted are the pairs of copies that the speed-up's interval
tells apart, and the intervals of percentiles that leave out the percentile of all copies and rounds together, which
stands for the truth: both with stretches of requests taken together, as hasten does, and as if they were independent.
An interval at 95 % should do either in 5 % of the cases. Nothing else may run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray
from scipy import stats

from hasten.intervals import BOOTSTRAP_RESAMPLES, Interval, median_ratio, percentile, percentile_effect
from hasten.profiling import ProfileOptions, time_only
from hasten.variant import open_variant
from hasten.workload import random_rows, read_texts
from provenance import save_result

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One interleaved run.

    Attributes:
        baseline: Milliseconds of each request; shape [samples].
        copies: The same of each copy; shape [copies, samples].
    """

    baseline: NDArray[np.float64]
    copies: NDArray[np.float64]


def measured(variant: Path, baseline: Path, texts: list[str], copies: int, options: ProfileOptions) -> Round:
    """Latencies of the baseline and of copies, one text at a time."""
    rows = random_rows(len(texts), options.samples, seed=options.seed)
    variants = [open_variant(baseline), *[open_variant(variant)] * copies]
    base, *others = time_only(variants, [texts[row] for row in rows], options)
    return Round(baseline=np.asarray(base.samples_ms), copies=np.asarray([other.samples_ms for other in others]))


def independent_ratio(base: NDArray[np.float64], new: NDArray[np.float64]) -> Interval:
    """The ratio of medians with the bootstrap's interval over single pairs."""

    def ratio(base: NDArray[np.float64], new: NDArray[np.float64], axis: int) -> Any:
        return np.median(base, axis=axis) / np.median(new, axis=axis)

    limits = stats.bootstrap(
        (base, new), ratio, paired=True, vectorized=True, method="percentile", n_resamples=BOOTSTRAP_RESAMPLES,
        batch=200, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Interval(value=float(ratio(base, new, -1)), lower=float(limits.low), upper=float(limits.high))


def leaves_out(interval: Interval, truth: float) -> bool:
    """Whether an interval does not hold a value."""
    low, high = interval.lower, interval.upper
    return (low is not None and low > truth) or (high is not None and high < truth)


def shares(rounds: list[Round]) -> dict[str, Any]:
    """How often copies are told apart, and how often percentiles' intervals leave out the common one."""
    pairs = [pair for one in rounds for pair in combinations(one.copies, 2)]
    found: dict[str, Any] = {"pairs": len(pairs), "pairs_told_apart": {
        "stretches": float(np.mean([leaves_out(median_ratio(a.tolist(), b.tolist()), 1.0) for a, b in pairs])),
        "independent": float(np.mean([leaves_out(independent_ratio(a, b), 1.0) for a, b in pairs])),
    }}  # fmt: skip
    every = [copy for one in rounds for copy in one.copies]
    for q in PERCENTILES:
        truth, effects = float(np.percentile(every, q)), [percentile_effect(copy, q) for copy in every]
        found[f"p{q}"] = {
            "of_all_ms": round(truth, 4), "effect_median": round(float(np.median(effects)), 2),
            "left_out": {
                "stretches": float(np.mean([
                    leaves_out(percentile(copy, q, effect=effect), truth)
                    for copy, effect in zip(every, effects, strict=True)
                ])),
                "independent": float(np.mean([leaves_out(percentile(copy, q), truth) for copy in every])),
            },
        }  # fmt: skip
    return found


def main(
    variant: Path, baseline: Path, texts: str, copies: int = 4, rounds: int = 6, samples: int = 1000,
    name: str = "alike",
) -> None:  # fmt: skip
    """Measures, counts, saves."""
    lines, taken = list(read_texts(texts)), list[Round]()
    for number in range(rounds):
        options = ProfileOptions(samples=samples, seed=number)
        taken.append(measured(variant, baseline, lines, copies, options))
        print(number, np.median(taken[-1].copies, axis=1).round(3), flush=True)
    found = shares(taken)
    save_result(name, {
        "variant": open_variant(variant).name, "baseline": open_variant(baseline).name, "copies": copies,
        "rounds": rounds, "samples": samples, "threads": ProfileOptions().resolved_threads, **found,
        "medians_ms": [np.median(one.copies, axis=1).round(4).tolist() for one in taken],
        "baseline_medians_ms": [round(float(np.median(one.baseline)), 3) for one in taken],
    })  # fmt: skip
    print(found)


if __name__ == "__main__":
    typer.run(main)
