"""Open-loop load on real servers, and what is made of its samples."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from serving import OPTIONS, live, make_app

from conftest import Hasten
from hasten.errors import MeasurementError, UsageError
from hasten.load import (
    DECIDING,
    EXPECTED,
    Load,
    LoadOptions,
    due_times,
    find_max,
    highest,
    histogram,
    offer,
    overhead_ms,
    require_up,
    sorted_out,
)
from hasten.open_loop import Outcome

SHORT = LoadOptions(rate=100, seconds=0.5, p99_ms=2000)
RATES = st.floats(1, 2000)


def made(rate: float, good: int, late: int = 0, refused: int = 0, failed: int = 0) -> Load:
    return Load(
        rate=rate, seconds=10, p99_ms=50, latencies_ms=(5.0,) * good + (80.0,) * late, refused_ms=(1.0,) * refused,
        errors={500: failed} if failed else {}, send_delays_ms=(0.0,),
    )  # fmt: skip


@given(RATES, st.floats(0.1, 5), st.integers(0, 99))
def test_requests_are_due_as_a_poisson_process_has_them(rate: float, seconds: float, seed: int) -> None:
    options = LoadOptions(rate=rate, seconds=seconds, seed=seed)
    due = due_times(options)
    assert (np.diff(due) >= 0).all()
    assert len(due) == 1 or due[-1] <= seconds
    assert abs(len(due) - rate * seconds) <= 6 * (rate * seconds) ** 0.5 + 6
    np.testing.assert_array_equal(due, due_times(options))


def test_every_request_is_answered_and_counted_once() -> None:
    with live(make_app()) as url:
        load = offer(url, ["good", "fine"], SHORT)
    assert load.offered == len(load.latencies_ms) == len(load.send_delays_ms) == len(due_times(SHORT))
    assert load.good == load.offered
    assert load.goodput == pytest.approx(load.offered / 0.5)
    assert min(load.latencies_ms) > 0


def test_refusals_and_errors_are_no_answers() -> None:
    with live(make_app()) as url:
        refused = offer(url, ["good"], replace(SHORT, p99_ms=1e-6))
        failed = offer(url, ["good"], SHORT)
        assert (len(refused.refused_ms), refused.good, refused.holds) == (refused.offered, 0, False)
        assert failed.errors == {}
        with pytest.raises(MeasurementError, match=r"none of .* requests was answered .status 404.; is it up"):
            offer(f"{url}/nowhere", ["good"], SHORT)
    with pytest.raises(MeasurementError, match="status 0"):
        offer(url, ["good"], SHORT)


@pytest.mark.parametrize(
    ("load", "holds"),
    [(made(1, 1000), True), (made(1, 100), False), (made(1, 1000, late=30), False), (made(1, 1000, refused=30), False),
     (made(1, 1000, failed=30), False), (made(1, 9990, late=10), True)],
)  # fmt: skip
def test_a_p99_holds_where_the_share_of_misses_is_shown_to_be_small(load: Load, *, holds: bool) -> None:
    assert load.holds == holds


def test_misses_that_follow_each_other_say_less_than_as_many_apart() -> None:
    fates = [Outcome(status=200, sent_s=0.0, ended_s=seconds) for seconds in (0.01,) * 4980 + (0.2,) * 20]
    apart = [fates[row] for row in np.random.default_rng(0).permutation(len(fates))]
    alone, together = sorted_out(apart, LoadOptions(rate=1)), sorted_out(fates, LoadOptions(rate=1))
    assert alone.missed.value == together.missed.value == 20 / 5000
    assert alone.effect < 2
    assert together.effect > 10
    assert (alone.holds, together.holds) == (True, False)


@given(st.floats(2, 5000), st.floats(1, 1000))
def test_the_highest_rate_is_found(capacity: float, start: float) -> None:
    trials = find_max(lambda rate: made(rate, 1000) if rate <= capacity else made(rate, 100, late=900), start, 1e4)
    best = highest(trials)
    assert best is not None
    assert capacity / 1.06 <= best.rate <= capacity
    assert len(trials) < 30


def test_the_search_asks_no_more_of_misses_than_they_show() -> None:
    """Ten misses in ten thousand hold; in one burst of that length they do not."""
    bursts, capacity = replace(made(1, 9990, late=10), effect=100), 300.0

    def tried(rate: float) -> Load:
        return replace(made(rate, 9990, late=10) if rate <= capacity / 2 else bursts, rate=rate)

    best = highest(find_max(tried, 100, 1e4))
    assert best is not None
    assert capacity / 2 / 1.06 <= best.rate <= capacity / 2


@pytest.mark.parametrize("start", [50, 80, 87])
def test_the_search_ends_no_earlier_than_at_its_least_rate(start: float) -> None:
    least = EXPECTED / 10
    best = highest(
        find_max(lambda rate: made(rate, 1000) if rate <= 1.05 * least else made(rate, 100, late=900), start, 10)
    )
    assert best is not None
    assert least <= best.rate <= 1.05 * least


def test_a_server_that_holds_nothing_ends_the_search() -> None:
    assert highest(find_max(lambda rate: made(rate, 0, late=10), 100, 10)) is None


def test_rates_that_offer_too_few_requests_to_decide_are_not_tried() -> None:
    assert not made(1, DECIDING - 1).holds
    assert made(1, DECIDING).holds
    tried = [trial.rate for trial in find_max(lambda rate: made(rate, 0, late=10), 10, 10)]
    assert tried == [EXPECTED / 10]
    assert stats.poisson(EXPECTED).cdf(DECIDING - 1) < 0.003


def test_the_generator_knows_what_it_adds() -> None:
    own = overhead_ms()
    assert 0 < own.value < 1000


def test_the_histogram_has_the_samples_percentiles() -> None:
    latencies = tuple(np.random.default_rng(0).lognormal(2, 0.5, 5000).tolist())
    load = replace(made(1, 1), latencies_ms=latencies)
    for q in (50, 95, 99):
        found = histogram(load.latencies_ms).get_value_at_percentile(q) / 1000
        assert found == pytest.approx(np.percentile(latencies, q, method="inverted_cdf"), rel=2e-3)
        assert load.percentile(q).value == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("field", ["rate", "seconds", "p99_ms"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_what_cannot_be_offered_is_refused(field: str, value: float) -> None:
    with pytest.raises(UsageError, match="must be above 0"):
        replace(SHORT, **{field: value})


def test_the_verb_shows_a_table_and_says_whether_it_holds(
    hasten: Hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.load.OVERHEAD_S", 0.2)
    (tmp_path / "texts.csv").write_text("text\ngood\nfine\n", encoding="utf-8")
    with live(make_app(options=OPTIONS)) as url:
        arguments = ["bench", url, "--texts", tmp_path / "texts.csv", "--rate", 200]
        status, shown, _ = hasten(
            *arguments, "--seconds", 2.3, "--p99-ms", 10_000, "--histogram", tmp_path / "latency.hgrm"
        )
        assert status == 0, shown
        assert "p99 of 10000 ms: holds at 200.0 requests a second." in shown
        assert "The generator itself:" in shown
        assert "Percentile" in (tmp_path / "latency.hgrm").read_text(encoding="utf-8")
        arguments += ["--seconds", 0.1]
        assert hasten(*arguments, "--p99-ms", 1e-6)[0] == 3
        status, shown, _ = hasten(*arguments, "--p99-ms", 10_000, "--histogram", tmp_path / "nowhere" / "latency.hgrm")
        assert (status, "fewer than" in shown) == (1, True)
        status, shown, _ = hasten(*arguments, "--p99-ms", 1e-6, "--find-max")
        assert (status, "in --seconds 0.1 none below 4400 a second can be tried" in shown) == (3, True)


def test_a_server_that_is_not_there_is_told_before_a_load_is_offered() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(MeasurementError, match="no reply to a first request"):
        require_up(url, "fine", SHORT)
    with live(make_app()) as there:
        require_up(there, "fine", SHORT)


def test_headers_go_with_every_request_and_are_shown_nowhere(
    hasten: Hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str | None, str | None]] = []

    class Gate(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.headers["authorization"], self.headers["x-tenant"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    headers = ("Authorization: Bearer s3cret", "x-tenant:\tux")
    options, texts = replace(SHORT, headers=headers), tmp_path / "texts.csv"
    texts.write_text("text\ngood\nfine\n", encoding="utf-8")
    monkeypatch.setattr("hasten.load.OVERHEAD_S", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Gate) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            require_up(url, "fine", options)
            offer(url, ["good"], options)
            by_hand = len(seen)
            flags = [part for header in headers for part in ("--header", header)]
            _, *output = hasten("bench", url, "--texts", texts, "--seconds", 0.2, *flags)
        finally:
            server.shutdown()
    assert len(seen) > by_hand > 1
    assert set(seen) == {("Bearer s3cret", "ux")}
    assert "s3cret" not in repr(options) + "".join(output)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("s3cret-token", "header 1 of 1 is not of the form"),
        ("a b: c", "not of the form"),
        ("x-a: b\r\nx-c: d", "not of the form"),
        ("x-a: ", "not of the form"),
        ("x-a: \u00fc", "not of the form"),
        ("Content-Length: 5", "set by the load itself"),
        ("X-Hasten-Deadline-Ms: 5", "set by the load itself"),
    ],
)
def test_headers_that_are_none_or_the_loads_own_are_refused(header: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as raised:
        replace(SHORT, headers=(header,))
    assert "s3cret" not in str(raised.value)


def test_a_header_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="'x-a' is given twice"):
        replace(SHORT, headers=("X-A: 1", "x-a: 2"))
