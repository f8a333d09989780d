"""How often hasten's intervals hold the truth, and how often equal variants are told apart, by simulation.

Claims: the two-sided 95 % intervals of accuracy retention hold the truth in 93 to 97 % of runs, those of p99 in at
least 93 %, their one-sided 95 % bounds in at least 93 %, and a variant compared with an equal one shows a difference in
at most 5 %. Nothing is claimed of a machine of two speeds that last for some requests each, where an interval can only
allow for what it saw of them; those rows show how far it does, beside intervals that take requests to be independent.

A share of 1,000 runs has a standard error of 0.7 points; 5 % are taken as exceeded when two of them lie above. For p99
the exact coverage without a design effect is given too: the limits are order statistics, so it is the same for every
continuous latency and follows from the binomial distribution.

Run: `python benchmarks/interval_coverage.py [--runs 1000]`; a few minutes on one core. Designs outside the claims are
marked in the table and listed in the JSON.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy import optimize, stats

from hasten.intervals import (
    ONE_SIDED,
    TWO_SIDED,
    Interval,
    median_ratio,
    paired_ratio,
    percentile,
    percentile_bounds,
    percentile_effect,
)
from hasten.measurement import this_host

SEED = 20_240_607
ROWS, ACCURACIES, RETENTIONS = (300, 1000, 5000), (0.8, 0.92, 0.97), (0.95, 0.98, 0.99, 1.0)
SHARED_ERRORS = 0.8
SAMPLES, SPEEDUP_SAMPLES = (300, 1000, 3000), (300, 1000)
SLOW_SHARE = 0.02
STRETCHES, SLOWER, STRETCHED = (10, 20, 100), 1.5, (50, 95, 99)
TRUTH_REQUESTS = 4_000_000
COVERAGE_LOW, COVERAGE_HIGH, BOUND_LOW, CLAIMS_HIGH = 0.93, 0.97, 0.93, 0.05
RESULT = Path(__file__).parent / "results" / "interval_coverage.json"
HEAD = f"{'quantity':<14} {'design':<34} {'two-sided':>10} {'lower':>7} {'upper':>7} {'differs':>8} {'exact':>7}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one design gave; all shares are 0 to 1.

    Attributes:
        quantity: `retention`, `p99`, `speedup`, or one of those of a machine of two speeds.
        design: What was simulated.
        truth: The true value.
        two_sided: Share of runs whose two-sided 95 % interval holds the truth.
        lower: Share of runs whose one-sided 95 % lower bound is at most the truth.
        upper: Share of runs whose one-sided 95 % upper bound is at least the truth; a bound that does not exist holds.
        no_upper: Share of runs whose two-sided interval has no upper limit.
        differs: Share of runs whose two-sided interval leaves out 1, where both variants are equal; None elsewhere.
        exact: Coverage of the two-sided interval by the binomial distribution where it takes no design effect; None
            where it depends on the data.
        runs: Number of simulated runs.
    """

    quantity: str
    design: dict[str, float | str]
    truth: float
    two_sided: float
    lower: float
    upper: float
    no_upper: float
    differs: float | None
    exact: float | None
    runs: int

    @property
    def marks(self) -> list[str]:
        """Which claims this design does not keep."""
        noise = 2 * math.sqrt(CLAIMS_HIGH * (1 - CLAIMS_HIGH) / self.runs)
        found = ["differs"] if self.differs is not None and self.differs > CLAIMS_HIGH + noise else []
        if self.quantity not in ("retention", "p99"):
            return found if self.quantity == "speedup" else []
        highest = COVERAGE_HIGH if self.quantity == "retention" else 1
        found += [] if COVERAGE_LOW <= self.two_sided <= highest else ["two-sided"]
        return found + [name for name in ("lower", "upper") if getattr(self, name) < BOUND_LOW]


def simulate(
    quantity: str, design: dict[str, float | str], truth: float, draws: Iterator[Callable[[float], Interval]],
    exact: float | None = None,
) -> Row:  # fmt: skip
    """Counts over runs; each draw is one run, from a confidence level to its interval."""
    pairs = [(draw(TWO_SIDED), draw(ONE_SIDED)) for draw in draws]
    low = np.asarray([[_low(interval) for interval in pair] for pair in pairs])
    high = np.asarray([[_high(interval) for interval in pair] for pair in pairs])
    slack = 1e-12 * truth
    below, above = low <= truth + slack, high >= truth - slack
    equal = truth == 1
    return Row(
        quantity=quantity, design=design, truth=truth, exact=exact, two_sided=float((below & above)[:, 0].mean()),
        lower=float(below[:, 1].mean()), upper=float(above[:, 1].mean()), no_upper=float(np.isinf(high[:, 0]).mean()),
        differs=float((~(below & above))[:, 0].mean()) if equal else None, runs=len(pairs),
    )  # fmt: skip


def _low(interval: Interval) -> float:
    return -math.inf if interval.lower is None else interval.lower


def _high(interval: Interval) -> float:
    return math.inf if interval.upper is None else interval.upper


@cache
def retention_interval(rows: int, both: int, gained: int, lost: int, level: float) -> Interval:
    """The product's interval for a table of paired answers; the order of the rows does not matter."""
    new = np.zeros(rows, dtype=bool)
    base = np.zeros(rows, dtype=bool)
    new[: both + gained] = True
    base[:both] = base[both + gained : both + gained + lost] = True
    return paired_ratio(new, base, level=level)


def retention_shares(accuracy: float, retention: float) -> tuple[float, float, float, float]:
    """Shares of rows right under both, gained, lost and wrong under both; most of the baseline's errors are shared."""
    gained = (1 - accuracy) * (1 - SHARED_ERRORS)
    both = retention * accuracy - gained
    return both, gained, accuracy - both, (1 - accuracy) * SHARED_ERRORS


def retention_row(rows: int, accuracy: float, retention: float, runs: int, generator: np.random.Generator) -> Row:
    """Paired answers of a baseline and a variant of a known true retention."""
    tables = generator.multinomial(rows, retention_shares(accuracy, retention), runs)

    def draws() -> Iterator[Callable[[float], Interval]]:
        for both, gained, lost, _ in tables.tolist():
            yield lambda level, t=(rows, both, gained, lost): retention_interval(*t, level)

    return simulate("retention", {"rows": rows, "accuracy": accuracy}, retention, draws())


def lognormal(generator: np.random.Generator, size: int) -> np.ndarray:
    """Latencies in ms with a median of 10."""
    return generator.lognormal(math.log(10), 0.4, size)


def gamma(generator: np.random.Generator, size: int) -> np.ndarray:
    """Latencies in ms with a mean of 20."""
    return generator.gamma(4, 5, size)


def bimodal(generator: np.random.Generator, size: int) -> np.ndarray:
    """Latencies in ms of which most are near 15 and a few, as when the machine does something else, near 60."""
    slow = generator.random(size) < SLOW_SHARE
    return np.exp(generator.normal(np.where(slow, math.log(60), math.log(15)), 0.2))


def true_p99(name: str) -> float:
    """The 99th percentile of a latency above, in ms."""
    if name == "lognormal":
        return float(stats.lognorm.ppf(0.99, 0.4, scale=10))
    if name == "gamma":
        return float(stats.gamma.ppf(0.99, 4, scale=5))
    fast, slow = stats.lognorm(0.2, scale=15), stats.lognorm(0.2, scale=60)
    return float(optimize.brentq(lambda x: (1 - SLOW_SHARE) * fast.cdf(x) + SLOW_SHARE * slow.cdf(x) - 0.99, 1, 1000))


def exact_p99(samples: int) -> float:
    """Coverage of the two-sided p99 interval for any continuous latency; NaN where its limits fall between ranks."""
    interval = percentile(np.arange(1.0, samples + 1), 99)
    low, high = 0 if interval.lower is None else interval.lower, interval.upper
    if low % 1 or (high or 0) % 1:
        return math.nan
    within = stats.binom(samples, 0.99)
    return float((1 if high is None else within.cdf(high - 1)) - within.cdf(low - 1))


def p99_row(samples: int, draw: Callable[[np.random.Generator, int], Any], runs: int, rng: np.random.Generator) -> Row:
    """Independent latencies of a known true p99."""

    def draws() -> Iterator[Callable[[float], Interval]]:
        for _ in range(runs):
            taken = draw(rng, samples)
            yield partial(percentile_interval, taken, 99)

    name = draw.__name__
    return simulate("p99", {"samples": samples, "latency": name}, true_p99(name), draws(), exact_p99(samples))


def percentile_interval(taken: np.ndarray, q: float, level: float) -> Interval:
    """The product's interval for requests in the order taken."""
    interval = percentile if level == TWO_SIDED else percentile_bounds
    return interval(taken, q, effect=percentile_effect(taken, q))


def two_speeds(generator: np.random.Generator, size: int, stretch: int) -> np.ndarray:
    """Latencies in ms of a machine that is slower for stretches of geometric length, as fast in between."""
    ends = np.cumsum(generator.geometric(1 / stretch, size))
    slow = (np.searchsorted(ends, np.arange(size), side="right") + generator.integers(2)) % 2 == 1
    return generator.lognormal(math.log(10), 0.3, size) * np.where(slow, SLOWER, 1.0)


def stretches_row(samples: int, stretch: int, q: float, runs: int, generator: np.random.Generator) -> Iterator[Row]:
    """A percentile on a machine of two speeds, and what it were if requests were independent."""
    truth = float(np.percentile(two_speeds(generator, TRUTH_REQUESTS, stretch), q))
    taken = [two_speeds(generator, samples, stretch) for _ in range(runs)]
    design: dict[str, float | str] = {"samples": samples, "stretch": stretch}
    yield simulate(f"p{q:g}, stretches", design, truth, (partial(percentile_interval, one, q) for one in taken))
    yield simulate(f"p{q:g}, as if not", design, truth, (
        lambda level, one=one: (percentile if level == TWO_SIDED else percentile_bounds)(one, q) for one in taken
    ))  # fmt: skip


def speedup_row(samples: int, runs: int, generator: np.random.Generator) -> Row:
    """Two equal variants on the same texts: what the text costs is common to both, the noise is not."""

    def draws() -> Iterator[Callable[[float], Interval]]:
        for _ in range(runs):
            texts = generator.lognormal(math.log(10), 0.4, samples)
            base, new = (texts * generator.lognormal(0, 0.1, samples) for _ in range(2))
            yield lambda level, base=base, new=new: median_ratio(base, new, level=level)

    return simulate("speedup", {"samples": samples}, 1.0, draws())


def all_rows(runs: int) -> Iterator[Row]:
    """Every design, each with random numbers of its own."""
    streams = (np.random.default_rng((SEED, number)) for number in range(10_000))
    for rows, accuracy, retention in product(ROWS, ACCURACIES, RETENTIONS):
        yield retention_row(rows, accuracy, retention, runs, next(streams))
    for samples, draw in product(SAMPLES, (lognormal, gamma, bimodal)):
        yield p99_row(samples, draw, runs, next(streams))
    for samples in SPEEDUP_SAMPLES:
        yield speedup_row(samples, runs, next(streams))
    for samples, stretch, q in product(SPEEDUP_SAMPLES, STRETCHES, STRETCHED):
        yield from stretches_row(samples, stretch, q, runs, next(streams))


def line(row: Row) -> str:
    """One line of the table, in percent."""
    design = " ".join(f"{key}={value}" for key, value in row.design.items())
    design += f" true={row.truth:g}" if row.quantity in ("retention", "speedup") else ""
    shares = [row.two_sided, row.lower, row.upper, row.differs, row.exact]
    shown = ["-" if share is None else f"{share:.1%}" for share in shares]
    widths = (10, 7, 7, 8, 7)
    cells = " ".join(f"{text:>{width}}" for text, width in zip(shown, widths, strict=True))
    return f"{row.quantity:<14} {design:<34} {cells}" + ("  <- " + ", ".join(row.marks) if row.marks else "")


def summary(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Lowest and highest shares by quantity."""
    found: dict[str, dict[str, float]] = {}
    for quantity in dict.fromkeys(row.quantity for row in rows):
        own = [row for row in rows if row.quantity == quantity]
        covered, claims = [row.two_sided for row in own], [row.differs for row in own if row.differs is not None]
        found[quantity] = {
            "two_sided_min": min(covered), "two_sided_max": max(covered), "lower_min": min(row.lower for row in own),
            "upper_min": min(row.upper for row in own), "designs": len(own),
        } | ({"differs_max": max(claims)} if claims else {})  # fmt: skip
    return found


def git(*words: str) -> str:
    """What git prints, in the repository of this script."""
    done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main(runs: Annotated[int, typer.Option(help="Simulated runs a design.")] = 1000, out: Path = RESULT) -> None:
    """Simulates every design, prints the table and writes it as JSON."""
    started, commit = datetime.now(UTC), git("rev-parse", "HEAD")
    rows = []
    print(HEAD)
    for row in all_rows(runs):
        print(line(row), flush=True)
        rows.append(row)
    result = {
        "claim": "95 % intervals hold the truth in 93 to 97 % of runs, those of p99 in at least 93 %; "
        "equal variants differ in at most 5 % of runs",
        "date": started.isoformat(timespec="seconds"),
        "duration_s": round((datetime.now(UTC) - started).total_seconds(), 1),
        "commit": commit,
        "source_changed_since_commit": bool(git("status", "--porcelain", "--", "../src/hasten/intervals.py")),
        "host": asdict(this_host()),
        "seed": SEED,
        "runs": runs,
        "standard_error_at_95": round(math.sqrt(0.95 * 0.05 / runs), 4),
        "shared_errors": SHARED_ERRORS,
        "slow_share": SLOW_SHARE,
        "summary": summary(rows),
        "outside": [asdict(row) | {"marks": row.marks} for row in rows if row.marks],
        "rows": [asdict(row) for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{len(result['outside'])} of {len(rows)} designs outside the claims; {out.name} written")


if __name__ == "__main__":
    typer.run(main)
