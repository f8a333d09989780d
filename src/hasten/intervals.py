"""Intervals for accuracies, retentions and latency percentiles; every one of them SciPy's or a short formula on it.

Two-sided intervals are at 95 % and are what reports show. One-sided 95 % bounds are what verdicts use; they are the
limits of the two-sided 90 % interval.

Latencies that follow each other are alike, since the machine's speed comes in stretches, so they say less than as many
independent ones. How much less is their design effect (Kish 1965, "Survey Sampling", section 8.2), which intervals of
percentiles, means and shares in the order taken are given; that of a ratio of medians resamples stretches.

Not here: multiple-comparison corrections, Bayesian intervals, tests of means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

TWO_SIDED = 0.95
ONE_SIDED = 0.90
BOOTSTRAP_RESAMPLES = 1999
BOOTSTRAP_BATCH = 200  # resamples in memory at the same time
RATIO_SPAN = 1e6
TURN = 25  # requests of a variant in a row, see `hasten.profiling`


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and the limits of its two-sided interval.

    Attributes:
        value: The estimate.
        lower: Lower limit; None where the data cannot give one.
        upper: Upper limit; None where the data cannot give one.
    """

    value: float
    lower: float | None
    upper: float | None

    def is_above(self, limit: float) -> bool:
        """Whether it is shown to be above a limit: its lower end is."""
        return self.lower is not None and self.lower > limit


def proportion(successes: int, total: int, *, level: float = TWO_SIDED, effect: float = 1.0) -> Interval:
    """Wilson's score interval for a proportion.

    Args:
        successes: Number of right answers, 0 to `total`.
        total: Number of rows, at least 1.
        level: Confidence level of the two-sided interval, 0 to 1.
        effect: The rows' design effect, at least 1; 1 where they are independent.

    Returns:
        The proportion (0 to 1) and its interval.

    Source:
        Wilson 1927, as `scipy.stats.binomtest(...).proportion_ci("wilson")` has it for whole numbers; what rows are
        worth with a design effect is none.
    """
    from scipy import stats

    share, worth, z = successes / total, total / effect, float(stats.norm.ppf((1 + level) / 2))
    middle = (share + z**2 / (2 * worth)) / (1 + z**2 / worth)
    half = z / (1 + z**2 / worth) * math.sqrt(share * (1 - share) / worth + z**2 / (4 * worth**2))
    lower = 0.0 if successes == 0 else middle - half
    return Interval(value=share, lower=lower, upper=1.0 if successes == total else middle + half)


def paired_ratio(new: NDArray[np.bool_], base: NDArray[np.bool_], *, level: float = TWO_SIDED) -> Interval:
    """Interval for the ratio of two accuracies on the same rows: what share of the accuracy is retained.

    Args:
        new: Whether each row is right under the new model; shape [rows].
        base: The same under the baseline; shape [rows]; at least one row right.
        level: Confidence level of the two-sided interval, 0 to 1.

    Returns:
        accuracy(new) / accuracy(base) and its interval.

    Source:
        Nam and Blackwelder 2002, "Analysis of the ratio of marginal probabilities in a matched-pair setting",
        Statistics in Medicine 21:689: the ratios that a score test does not reject. At 1 that test is McNemar's.
    """
    from scipy import optimize, stats

    both, gained, lost = int((new & base).sum()), int((new & ~base).sum()), int((~new & base).sum())
    value, quantile = (both + gained) / (both + lost), float(stats.norm.ppf((1 + level) / 2))
    if value == 0:
        return Interval(value=0.0, lower=0.0, upper=quantile**2 / lost)

    def apart(ratio: float, wanted: float) -> float:
        return _ratio_score(ratio, both, gained, lost) - wanted

    lower: Any = optimize.brentq(apart, value / RATIO_SPAN, value, args=(quantile,))
    upper: Any = optimize.brentq(apart, value, value * RATIO_SPAN, args=(-quantile,))
    return Interval(value=value, lower=float(lower), upper=float(upper))


def points_lost(new: NDArray[np.bool_], base: NDArray[np.bool_], *, level: float = TWO_SIDED) -> Interval:
    """Points of accuracy that a new model loses on the same rows, by the share that it retains.

    Args:
        new: Whether each row is right under the new model; shape [rows].
        base: The same under the baseline; shape [rows].
        level: Confidence level of the two-sided interval, 0 to 1.

    Returns:
        100 * (accuracy(base) - accuracy(new)) and its interval, negative where the new model gains; without an interval
        where no row is right under the baseline, of which no share can be kept.
    """
    if not base.any():
        return Interval(value=-100 * float(new.mean()), lower=None, upper=None)
    points, kept = 100 * float(base.mean()), paired_ratio(new, base, level=level)
    lower, upper = (None if limit is None else points * (1 - limit) for limit in (kept.upper, kept.lower))
    return Interval(value=points * (1 - kept.value), lower=lower, upper=upper)


def _ratio_score(ratio: float, both: int, gained: int, lost: int) -> float:
    """How many standard errors the counts are from a ratio, with the variance that is most likely at that ratio."""
    n_new, n_base = both + gained, both + lost
    root = math.hypot(n_new - ratio**2 * n_base, 2 * ratio * math.sqrt(gained * lost))
    gains = (ratio**2 * (n_base + 2 * gained) - n_new + root) / (2 * ratio * (ratio + 1))
    losses = ratio * gains - (ratio - 1) * (both + gained + lost)
    variance = ratio * (gains + losses)
    return (n_new - ratio * n_base) / math.sqrt(variance) if variance > 0 else 0.0


def stretch(n: int, *, turns: int = 1) -> int:
    """How many observations that follow each other are taken together.

    Args:
        n: How many there are, at least 1.
        turns: Turns of the profiler that a stretch has at least, where there are eight such stretches.

    Returns:
        The square root of `n`; where there are that many, rounded up to whole turns.

    Source:
        Jones, Haran, Caffo and Neath 2006, "Fixed-width output analysis for Markov chain Monte Carlo", JASA 101:1537,
        for the square root. We differ in the whole turns, since requests of one turn are the most alike.
    """
    if n < 8 * turns * TURN:
        return max(1, math.isqrt(n))
    return TURN * max(turns, math.ceil(math.sqrt(n) / TURN))


def design_effect(samples: NDArray[Any]) -> float:
    """How many observations in a row are worth an independent one, for their mean.

    Args:
        samples: Observations in the order taken; shape [samples], at least one.

    Returns:
        The variance of the sums of all stretches of two turns or more over that of sums of independent observations; at
        least 1, so that chance cannot narrow an interval.

    Source:
        Politis and Romano 1992, "A circular block-resampling procedure for stationary data": the variance that it
        gives the mean, without resampling. After the last observation comes the first again, so each counts alike. We
        differ by (n - 1) / (n - stretch), which makes the estimate right on average for independent ones.
    """
    n, variance = len(samples), float(samples.var())
    length = stretch(n, turns=2)
    if n == length or variance == 0:
        return 1.0
    apart = samples - samples.mean()
    reached = np.cumsum(np.concatenate([[0.0], apart, apart[: length - 1]]))
    sums = reached[length:] - reached[:-length]
    return max(1.0, float((sums**2).mean() / (length * variance) * (n - 1) / (n - length)))


def percentile_effect(samples: NDArray[np.float64], q: float) -> float:
    """The design effect of percentile `q` of observations in the order taken; shape [samples], at least one."""
    return design_effect(samples > np.percentile(samples, q))


def percentile(samples: NDArray[np.float64], q: float, *, effect: float = 1.0) -> Interval:
    """A percentile with a distribution-free two-sided 95 % interval from order statistics.

    Args:
        samples: Observations; shape [samples].
        q: Which percentile, above 0 and below 100.
        effect: Their design effect, at least 1; 1 where they are independent.

    Returns:
        The percentile in the samples' unit; both limits are None where there are too few samples for an interval.

    Source:
        Conover 1999, Practical Nonparametric Statistics, section 3.2. We differ in the choice of the two ranks: the
        shortest pair that covers, and of those the one with the most equal tails. Equal tails alone, as in
        `scipy.stats.quantile_test`, cover more than they claim (97.6 % at the 99th percentile of 1,000 samples).
        With a design effect the ranks are those of as many samples as these are worth, at the same shares of them:
        Woodruff 1952, "Confidence intervals for medians and other position measures", JASA 47:635.
    """
    worth = _worth(len(samples), effect)
    ranks = _covering_ranks(worth, q / 100, TWO_SIDED) or (None, None)
    return _between(samples, q, worth, *ranks)


def _worth(n: int, effect: float) -> int:
    """As how many independent observations some count."""
    return max(1, math.floor(n / effect))


def _between(samples: NDArray[np.float64], q: float, worth: int, low: int | None, high: int | None) -> Interval:
    """A percentile, and the samples at two ranks (from 1) of the independent ones that they are worth."""
    ordered, each = np.sort(samples), len(samples) / worth
    return Interval(
        value=float(np.percentile(samples, q)),
        lower=None if low is None else float(ordered[math.floor((low - 1) * each)]),
        upper=None if high is None else float(ordered[min(len(ordered), math.ceil(high * each)) - 1]),
    )


@cache
def _covering_ranks(n: int, share: float, level: float) -> tuple[int, int] | None:
    """Ranks (from 1) of the two order statistics between which the quantile lies with at least a probability."""
    from scipy import stats

    below = stats.binom.cdf(np.arange(-1, n), n, share)  # below[r]: fewer than r samples lie under the quantile
    upper = np.arange(1, n + 1)[below[1:] >= level]
    lower = np.searchsorted(below, below[upper] - level, side="right") - 1
    upper, lower = upper[lower >= 1], lower[lower >= 1]
    if not len(upper):
        return None
    imbalance = np.abs(below[lower] - (1 - below[upper]))
    best = np.lexsort((imbalance, upper - lower))[0]
    return int(lower[best]), int(upper[best])


def percentile_bounds(samples: NDArray[np.float64], q: float, *, effect: float = 1.0) -> Interval:
    """A percentile with its two distribution-free one-sided 95 % bounds, which verdicts use.

    Args:
        samples: Observations; shape [samples].
        q: Which percentile, above 0 and below 100.
        effect: Their design effect, at least 1; 1 where they are independent.

    Returns:
        The percentile in the samples' unit; a bound is None where too few samples leave it undetermined.

    Source:
        Conover 1999, section 3.2, as `scipy.stats.quantile_test` has it; with a design effect, as `percentile`.
    """
    worth = _worth(len(samples), effect)
    return _between(samples, q, worth, *_bounding_ranks(worth, q / 100))


@cache
def _bounding_ranks(n: int, share: float) -> tuple[int | None, int | None]:
    """Ranks (from 1) of the order statistics that bound the quantile from below and from above."""
    from scipy import stats

    limits = stats.quantile_test(np.arange(1, n + 1), q=0, p=share).confidence_interval(ONE_SIDED)
    low, high = (int(rank) if math.isfinite(rank) else None for rank in (limits.low, limits.high))
    return low, high


def mean(samples: NDArray[np.float64], *, level: float = TWO_SIDED, effect: float = 1.0) -> Interval:
    """A mean with Student's interval.

    Args:
        samples: Observations in any unit; shape [samples], at least 2.
        level: Confidence level of the two-sided interval, 0 to 1.
        effect: Their design effect, at least 1; 1 where they are independent.

    Returns:
        The mean; its standard error and degrees of freedom are those of as many samples as these are worth.
    """
    from scipy import stats

    value = float(samples.mean())
    spread = float(stats.sem(samples)) * math.sqrt(effect)
    if spread == 0:
        return Interval(value=value, lower=value, upper=value)
    low, high = stats.t.interval(level, max(1, _worth(len(samples), effect) - 1), loc=value, scale=spread)
    return Interval(value=value, lower=float(low), upper=float(high))


def median_ratio(base: Sequence[float], new: Sequence[float], *, level: float = TWO_SIDED) -> Interval:
    """How many times smaller the median has become, from observations paired by index.

    Args:
        base: Observations of the baseline in the order taken; shape [samples].
        new: Observations of the same requests under the new model; shape [samples].
        level: Confidence level of the two-sided interval, 0 to 1.

    Returns:
        median(base) / median(new) and the percentile-bootstrap interval over resampled stretches of pairs (seeded).

    Source:
        Carlstein 1986, "The use of subseries values", Annals of Statistics 14:1171, for stretches that do not overlap;
        Efron and Tibshirani 1993, chapter 13, for the interval, as `scipy.stats.bootstrap` has it. What is left over
        at the end is in the estimate alone.
    """
    from scipy import stats

    pairs = np.asarray([base, new], dtype=np.float64)
    value, length = float(_ratio_of_medians(pairs)), stretch(len(base))
    count = len(base) // length
    if count < 2:
        return Interval(value=value, lower=None, upper=None)
    stretches = pairs[:, : count * length].reshape(2, count, length)

    def statistic(chosen: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        """Of stretches by their numbers; shape [..., stretches], which is the axis."""
        return _ratio_of_medians(stretches[:, chosen].reshape(2, *chosen.shape[:axis], -1))

    result = stats.bootstrap(
        (np.arange(count),), statistic, vectorized=True, confidence_level=level, method="percentile",
        n_resamples=BOOTSTRAP_RESAMPLES, batch=BOOTSTRAP_BATCH, rng=np.random.default_rng(0),
    )  # fmt: skip
    return Interval(
        value=value, lower=float(result.confidence_interval.low), upper=float(result.confidence_interval.high)
    )


def _ratio_of_medians(pairs: NDArray[np.float64]) -> Any:
    """Of observations in the last axis; shape [2, ..., samples]."""
    base, new = np.median(pairs, axis=-1)
    return base / new
