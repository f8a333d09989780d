"""Open-loop load: requests are sent when they are due, whether or not earlier ones were answered, as users do.

Gaps between requests are exponential (a Poisson process), and latency counts from the moment a request was due, not
from when it could be sent, so that a stall is seen by everybody who would have met it ("coordinated omission" is what
a closed loop does instead). Refusals and errors are counted as what they are and never as fast answers.

Source: Schroeder, Wierman and Harchol-Balter 2006, "Open Versus Closed: A Cautionary Tale".
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import uvloop
from numpy.typing import NDArray

from hasten import intervals
from hasten.errors import MeasurementError, MissingExtraError, UsageError
from hasten.intervals import Interval
from hasten.open_loop import Outcome, post_when_due

REFUSED = (429, 503)
ALLOWED_MISSES = 0.01  # what a p99 allows
DECIDING = 381  # requests; with fewer, not even none missed shows a p99 (Wilson's interval)
EXPECTED = 440  # so that hardly ever fewer than those come (three standard deviations of a Poisson number)
PRECISION = 0.05  # of the rate that is looked for
OVERHEAD_S, OVERHEAD_RATE = 2.0, 50.0
HIGHEST_MS, DIGITS = 60_000, 3
JSON = {"content-type": "application/json"}
DEADLINE = "x-hasten-deadline-ms"
HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?)")
OWN = {"host", "content-length", "transfer-encoding", "connection", *JSON, DEADLINE}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What is offered.

    Attributes:
        rate: Requests a second, on average; above 0.
        seconds: How long, above 0.
        p99_ms: Within how many milliseconds an answer is good, above 0; sent along as each request's deadline.
        seed: Seed of the gaps and of the order of texts.
        headers: Sent with each request, each `name: value` (RFC 9110, section 5.5, in ASCII); values are never shown.
    """

    rate: float = 50.0
    seconds: float = 10.0
    p99_ms: float = 50.0
    seed: int = 0
    headers: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UsageError: A value is out of range; a header is none, given twice, or one that the load sets itself.
        """
        self.header_fields()
        for name in ("rate", "seconds", "p99_ms"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name} must be above 0, not {getattr(self, name):g}")

    def header_fields(self) -> dict[str, str]:
        """The headers' values by name."""
        fields: dict[str, str] = {}
        for number, header in enumerate(self.headers, 1):
            if (found := HEADER.fullmatch(header)) is None:  # it may be a secret, so it is not shown
                raise UsageError(f"header {number} of {len(self.headers)} is not of the form 'name: value'")
            name = found[1].lower()
            if name in OWN:
                raise UsageError(f"the header {name!r} is set by the load itself; leave it out")
            if name in fields:
                raise UsageError(f"the header {name!r} is given twice; join its values by commas")
            fields[name] = found[2]
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What became of an offered load.

    Attributes:
        rate: Requests a second that were due, on average.
        seconds: For how long.
        p99_ms: Within how many milliseconds an answer was good.
        latencies_ms: Of each answered request, in the order due, from when it was due.
        refused_ms: Of each refusal (status 429 or 503), from when its request was due.
        errors: Requests that failed in another way, by status; 0 where there was none.
        send_delays_ms: How much later than due each request was sent; what the generator itself adds.
        effect: Design effect of whether a request was answered in time, by the order due: what misses one misses its
            neighbours. 1 where none was missed, since nothing then shows how they would come together.
    """

    rate: float
    seconds: float
    p99_ms: float
    latencies_ms: tuple[float, ...]
    refused_ms: tuple[float, ...]
    errors: dict[int, int]
    send_delays_ms: tuple[float, ...]
    effect: float = 1.0

    @property
    def offered(self) -> int:
        """Requests in all."""
        return len(self.latencies_ms) + len(self.refused_ms) + sum(self.errors.values())

    @property
    def good(self) -> int:
        """Requests answered in time."""
        return sum(latency <= self.p99_ms for latency in self.latencies_ms)

    @property
    def goodput(self) -> float:
        """Answers in time, a second."""
        return self.good / self.seconds

    @property
    def missed(self) -> Interval:
        """Share of requests not answered in time, refused ones among them, with its interval."""
        return intervals.proportion(self.offered - self.good, self.offered, effect=self.effect)

    @property
    def holds(self) -> bool:
        """Whether the p99 of all requests is shown to keep to the limit."""
        upper = self.missed.upper
        return upper is not None and upper <= ALLOWED_MISSES

    def percentile(self, q: float) -> Interval:
        """A percentile of the latency of what was answered, in milliseconds, with its interval."""
        latencies = np.asarray(self.latencies_ms)
        return intervals.percentile(latencies, q, effect=intervals.percentile_effect(latencies, q))


def due_times(options: LoadOptions) -> NDArray[np.float64]:
    """When requests are due, in seconds from the start.

    Args:
        options: Rate, length and seed.

    Returns:
        Ascending times; shape [requests], at least one.
    """
    generator = np.random.default_rng(options.seed)
    most = int(options.rate * options.seconds + 10 * (options.rate * options.seconds) ** 0.5 + 10)
    times = np.cumsum(generator.exponential(1 / options.rate, most))
    return times[: max(1, int(np.searchsorted(times, options.seconds)))]


def asked_rows(options: LoadOptions, texts: int, requests: int) -> NDArray[np.int64]:
    """Which text each request asks, in random order.

    Args:
        options: Its seed.
        texts: How many texts there are, at least 1.
        requests: How many requests.

    Returns:
        Indices of texts; shape [requests].
    """
    return np.random.default_rng(options.seed + 1).integers(0, texts, requests)


def require_up(url: str, text: str, options: LoadOptions) -> None:
    """Asks once, so that a server that is not there is told before a load is offered for nothing.

    Args:
        url: Where the server is.
        text: What is asked.
        options: Its headers.

    Raises:
        MeasurementError: There was no reply.
        UsageError: `url` is not that of a server.
    """
    body = msgspec.json.encode({"inputs": text})
    (found,) = uvloop.run(post_when_due(f"{url.rstrip('/')}/predict", [body], [0.0], JSON | options.header_fields()))
    if not found.status:
        raise MeasurementError(f"{url}: no reply to a first request; is a server there?")


def offer(url: str, texts: Sequence[str], options: LoadOptions) -> Load:
    """Offers a load to a server and waits for the last answer.

    Args:
        url: Where the server is; `/predict` is asked.
        texts: What is asked, at least one; one text a request, in random order.
        options: How much, how long.

    Returns:
        What became of it.

    Raises:
        MeasurementError: No request was answered or refused at all.
        UsageError: `url` is not that of a server.
    """
    due = due_times(options)
    bodies = [msgspec.json.encode({"inputs": texts[row]}) for row in asked_rows(options, len(texts), len(due))]
    headers = JSON | {DEADLINE: f"{options.p99_ms:g}"} | options.header_fields()
    sending = post_when_due(f"{url.rstrip('/')}/predict", bodies, due.tolist(), headers)
    load = sorted_out(uvloop.run(sending), options)
    if not load.latencies_ms and not load.refused_ms:
        statuses = ", ".join(map(str, sorted(load.errors)))
        raise MeasurementError(f"{url}: none of {load.offered} requests was answered (status {statuses}); is it up?")
    return load


def sorted_out(found: Sequence[Outcome], options: LoadOptions) -> Load:
    """What became of a load.

    Args:
        found: What became of each request, in the order due; at least one.
        options: What was offered.

    Returns:
        Answers, refusals and errors, each in that order.
    """
    errors: dict[int, int] = {}
    for outcome in found:
        if outcome.status != 200 and outcome.status not in REFUSED:
            errors[outcome.status] = errors.get(outcome.status, 0) + 1
    return Load(
        rate=options.rate,
        seconds=options.seconds,
        p99_ms=options.p99_ms,
        latencies_ms=tuple(1e3 * outcome.ended_s for outcome in found if outcome.status == 200),
        refused_ms=tuple(1e3 * outcome.ended_s for outcome in found if outcome.status in REFUSED),
        errors=errors,
        send_delays_ms=tuple(1e3 * outcome.sent_s for outcome in found),
        effect=intervals.design_effect(np.array([in_time(outcome, options.p99_ms) for outcome in found])),
    )


def in_time(outcome: Outcome, p99_ms: float) -> bool:
    """Whether a request was answered within so many milliseconds from when it was due."""
    return outcome.status == 200 and 1e3 * outcome.ended_s <= p99_ms


def is_shown_to_hold(load: Load) -> bool:
    """`Load.holds`, as a function of the load."""
    return load.holds


def find_max(
    try_rate: Callable[[float], Load], start: float, seconds: float, holds: Callable[[Load], bool] = is_shown_to_hold
) -> list[Load]:
    """Looks for the highest rate that holds: doubles or halves, then bisects.

    Args:
        try_rate: Offers a load of a rate.
        start: Where to begin, requests a second.
        seconds: How long each trial lasts; rates that offer fewer than `EXPECTED` requests in it are not tried.
        holds: Whether a trial's rate holds.

    Returns:
        All trials, in their order. The best is the last of the highest rate that holds.
    """
    least = EXPECTED / seconds
    trials = [try_rate(max(start, least))]
    start = trials[0].rate
    low, high = (start, None) if holds(trials[0]) else (None, start)
    while low is None or high is None or high / low > 1 + PRECISION:
        if low is None and (high or 0) <= least * (1 + PRECISION):
            break
        rate = 2 * (low or 0) if high is None else max(least, high / 2) if low is None else (low * high) ** 0.5
        trials.append(try_rate(rate))
        low, high = (rate, high) if holds(trials[-1]) else (low, rate)
    return trials


def highest(trials: Sequence[Load], holds: Callable[[Load], bool] = is_shown_to_hold) -> Load | None:
    """The trial of the highest rate that holds; None where none does."""
    return max(filter(holds, trials), key=lambda trial: trial.rate, default=None)


def overhead_ms(seed: int = 0) -> Interval:
    """What the generator and the network add: the median latency of a server that does nothing.

    Args:
        seed: Seed of the gaps.

    Returns:
        Milliseconds, with the interval of the median.
    """
    command = [sys.executable, "-m", "hasten.null_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            if server.stdout is None or not (port := server.stdout.readline().strip()):
                raise MeasurementError("the server that does nothing did not start")
            options = LoadOptions(rate=OVERHEAD_RATE, seconds=OVERHEAD_S, seed=seed)
            return offer(f"http://127.0.0.1:{port}", ["nothing"], options).percentile(50)
        finally:
            server.terminate()


def histogram(latencies_ms: Sequence[float]) -> Any:
    """Latencies as an HdrHistogram, in microseconds.

    Args:
        latencies_ms: Milliseconds of each; may be empty.

    Returns:
        A histogram of the package `hdrhistogram`, from 1 µs to a minute at three digits.

    Raises:
        MissingExtraError: hdrhistogram is not installed.
    """
    try:
        from hdrh.histogram import HdrHistogram
    except ImportError as error:
        raise MissingExtraError("hdrhistogram", "bench") from error
    made = HdrHistogram(1, HIGHEST_MS * 1000, DIGITS)
    for latency in latencies_ms:
        made.record_value(min(HIGHEST_MS * 1000, max(1, round(1000 * latency))))
    return made
