"""Budgets: what is met, missed or undecided, at the limits and between them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hasten.budget import Assessment, Budget, Judgement, Verdict, judge
from hasten.errors import MeasurementError, UsageError
from hasten.intervals import ONE_SIDED, percentile_effect
from hasten.measurement import Host, Latency, Measurement, Quality, Scenario, speedup
from hasten.variant import Parameters

HOST = Host(cpu="Test CPU", cores=2, instructions=(), memory_bytes=8, system="Linux", python="3.12", versions={})
SCENARIO = Scenario(name="test", split="test", workload_digest="ab", threads=1, warmup=2, key="run-1")
EASY = 0.01


def a_measurement(
    variant: str = "onnx-int8", *, samples_ms: Any = (1.0, 2.0), right: int = 9, rows: int = 10, gained: int = 0,
    key: str = "run-1",
) -> Measurement:  # fmt: skip
    """Right on the first rows; of those, `gained` are moved behind the others."""
    hits = [gained <= row < right + gained for row in range(rows)]
    samples = tuple(float(s) for s in samples_ms)
    return Measurement(
        schema="hasten.measurement/1", variant=variant, digest="cd", format="onnx", precision="int8",
        parameters=Parameters(embedding=3, encoder=2, head=1), size_bytes=10, peak_memory_bytes=20, host=HOST,
        scenario=replace(SCENARIO, key=key),
        latency=Latency(samples_ms=samples, tokens=(5,) * len(samples), tokenizer_ms=(0.1,) * len(samples)),
        quality=Quality(predictions=tuple(0 if hit else 1 for hit in hits), expected=(0,) * rows), breakdown_ms={},
    )  # fmt: skip


def verdicts(budget: Budget, measurement: Measurement, baseline: Measurement) -> dict[str, Judgement]:
    return {j.criterion: j for j in judge(budget, measurement, baseline).judgements}


def latencies(samples: int = 1000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(2, 0.4, samples)


BASE = a_measurement("torch-fp32", samples_ms=latencies() * 4, right=900, rows=1000)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"p99_ms": 0.0},
        {"p99_ms": -1.0},
        {"p99_ms": math.nan},
        {"p99_ms": math.inf},
        {"speedup": 0.0},
        {"speedup": math.nan},
        {"speedup": 2.0, "retain": 0.0},
        {"speedup": 2.0, "retain": 1.01},
        {"speedup": 2.0, "retain": math.nan},
        {"speedup": 2.0, "gate": "mean"},
    ],
)
def test_a_budget_without_meaning_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--") as caught:
        Budget(**options)
    assert caught.value.exit_status == 2


def test_only_the_criteria_that_were_asked_for_are_judged() -> None:
    one = verdicts(Budget(p99_ms=100), BASE, BASE)
    two = verdicts(Budget(speedup=1.0), BASE, BASE)
    both = verdicts(Budget(p99_ms=100, speedup=1.0), BASE, BASE)
    assert set(one) == {"p99_ms", "retention"}
    assert set(two) == {"speedup", "retention"}
    assert set(both) == {"p99_ms", "speedup", "retention"}


def test_p99_is_met_at_its_upper_bound_and_missed_below_its_lower() -> None:
    samples = latencies()
    measured = a_measurement(samples_ms=samples, right=900, rows=1000)
    found = measured.latency.percentile_bounds(99)
    cases: list[tuple[float, Verdict, bool]] = [
        (found.upper, "met", True),
        (np.nextafter(found.upper, 0), "undecided", True),
        (found.value, "undecided", True),
        (np.nextafter(found.value, 0), "undecided", False),
        (found.lower, "undecided", False),
        (np.nextafter(found.lower, 0), "missed", False),
    ]
    for limit, verdict, passes in cases:
        judged = verdicts(Budget(p99_ms=float(limit), retain=EASY), measured, BASE)["p99_ms"]
        assert (judged.verdict, judged.passes) == (verdict, passes), limit
        assert f"at most {limit:g} ms: {verdict}" in judged.reason


def test_at_the_point_it_takes_no_more_samples_than_a_p99_has_meaning_from() -> None:
    samples = [*([1.0] * 199), 50.0]
    measured = a_measurement(samples_ms=samples, right=900, rows=1000)
    judged = verdicts(Budget(p99_ms=10, gate="point", retain=EASY), measured, BASE)["p99_ms"]
    assert (judged.verdict, judged.passes, judged.needed) == ("undecided", True, 299)


def test_p99_at_the_point_is_met_or_missed() -> None:
    samples = latencies()
    measured, value = a_measurement(samples_ms=samples, right=900, rows=1000), np.percentile(samples, 99)
    at = verdicts(Budget(p99_ms=float(value), gate="point", retain=EASY), measured, BASE)["p99_ms"]
    under = verdicts(Budget(p99_ms=float(np.nextafter(value, 0)), gate="point", retain=EASY), measured, BASE)["p99_ms"]
    assert (at.verdict, under.verdict) == ("met", "missed")


@pytest.mark.parametrize("gate", ["bound", "point"])
@pytest.mark.parametrize(("samples", "verdict"), [(1, "undecided"), (298, "undecided"), (299, "met")])
def test_p99_needs_299_samples_at_any_gate(gate: Any, samples: int, verdict: str) -> None:
    measured = a_measurement(samples_ms=latencies(samples), right=900, rows=1000)
    judged = verdicts(Budget(p99_ms=1e6, gate=gate, retain=EASY), measured, BASE)["p99_ms"]
    assert judged.verdict == verdict
    assert judged.needed == (299 if verdict == "undecided" else None)
    assert ("about 299 samples would decide" in judged.reason) is (verdict == "undecided")


def test_the_samples_that_a_p99_needs_shrink_with_the_share_within() -> None:
    needed = []
    for over in (9, 7, 5):
        samples = np.full(1000, 10.0)
        samples[np.linspace(0, 900, over, dtype=int)] = 50.0  # far from each other, so each counts in full
        measured = a_measurement(samples_ms=samples, right=900, rows=1000)
        judged = verdicts(Budget(p99_ms=20, retain=EASY), measured, BASE)["p99_ms"]
        assert judged.verdict == "undecided"
        needed.append(judged.needed)
    assert needed[0] > needed[1] > needed[2] > 1000
    z = 1.6448536269514722
    assert needed[2] == math.ceil(z**2 * 0.99 * 0.01 / 0.005**2)


def test_samples_that_are_alike_count_as_fewer() -> None:
    samples = np.r_[np.full(995, 10.0), np.full(5, 50.0)]
    apart, together = samples[np.random.default_rng(0).permutation(1000)], samples
    alone, alike = (
        verdicts(Budget(p99_ms=20, retain=EASY), a_measurement(samples_ms=s, right=900, rows=1000), BASE)["p99_ms"]
        for s in (apart, together)
    )
    effect = percentile_effect(together, 99)
    assert effect > 2
    assert (alone.verdict, alike.verdict) == ("undecided", "undecided")
    assert alike.needed == pytest.approx(alone.needed * effect / percentile_effect(apart, 99), rel=0.01)


def test_a_p99_of_few_samples_that_are_alike_is_undecided_though_all_are_within() -> None:
    apart = np.random.default_rng(0).permutation(np.linspace(5, 15, 400))
    judged = [
        verdicts(Budget(p99_ms=20, retain=EASY), a_measurement(samples_ms=s, right=900, rows=1000), BASE)["p99_ms"]
        for s in (apart, np.sort(apart))
    ]
    assert [one.verdict for one in judged] == ["met", "undecided"]
    assert judged[1].needed > 400


def test_a_p99_whose_estimate_fails_names_no_number_of_samples() -> None:
    samples = np.r_[np.full(989, 10.0), np.full(11, 50.0)]
    judged = verdicts(Budget(p99_ms=20, retain=EASY), a_measurement(samples_ms=samples, right=900, rows=1000), BASE)
    assert (judged["p99_ms"].verdict, judged["p99_ms"].passes, judged["p99_ms"].needed) == ("undecided", False, None)


def test_speedup_is_met_at_its_lower_bound_and_missed_above_its_upper() -> None:
    measured = a_measurement(samples_ms=latencies(seed=1), right=900, rows=1000)
    found = speedup(BASE, measured, level=ONE_SIDED)
    cases: list[tuple[float, Verdict]] = [
        (found.lower, "met"),
        (np.nextafter(found.lower, 9), "undecided"),
        (found.upper, "undecided"),
        (np.nextafter(found.upper, 9), "missed"),
    ]
    for limit, verdict in cases:
        assert verdicts(Budget(speedup=float(limit), retain=EASY), measured, BASE)["speedup"].verdict == verdict
    point = Budget(speedup=found.value, gate="point", retain=EASY)
    above = Budget(speedup=float(np.nextafter(found.value, 9)), gate="point", retain=EASY)
    assert verdicts(point, measured, BASE)["speedup"].verdict == "met"
    assert verdicts(above, measured, BASE)["speedup"].verdict == "missed"


def test_retention_is_met_at_its_lower_bound_and_missed_above_its_upper() -> None:
    measured = a_measurement(samples_ms=latencies(), right=890, rows=1000, gained=5)
    found = measured.quality.retention(BASE.quality, level=ONE_SIDED)
    cases: list[tuple[float, Verdict]] = [
        (found.lower, "met"),
        (np.nextafter(found.lower, 2), "undecided"),
        (found.upper, "undecided"),
        (np.nextafter(found.upper, 2), "missed"),
    ]
    assert found.upper < 1
    for limit, verdict in cases:
        judged = verdicts(Budget(speedup=EASY, retain=float(limit)), measured, BASE)["retention"]
        assert judged.verdict == verdict
        assert (judged.needed is None) is (verdict != "undecided")
    point = Budget(speedup=EASY, gate="point", retain=found.value)
    above = Budget(speedup=EASY, gate="point", retain=float(np.nextafter(found.value, 2)))
    assert verdicts(point, measured, BASE)["retention"].verdict == "met"
    assert verdicts(above, measured, BASE)["retention"].verdict == "missed"


def test_the_rows_that_retention_needs_would_indeed_decide() -> None:
    def judged(times: int) -> Judgement:
        base = a_measurement("torch-fp32", samples_ms=latencies(), right=900 * times, rows=1000 * times)
        new = a_measurement(samples_ms=latencies(), right=896 * times, rows=1000 * times, gained=20 * times)
        return verdicts(Budget(speedup=EASY, retain=0.99), new, base)["retention"]

    few = judged(1)
    assert (few.verdict, few.passes) == ("undecided", True)
    assert few.needed > 1000
    assert f"about {few.needed:,} rows would decide" in few.reason
    assert judged(math.ceil(1.2 * few.needed / 1000)).verdict == "met"


def test_an_estimate_on_the_limit_is_decided_by_no_number_of_rows() -> None:
    measured = a_measurement(samples_ms=latencies(), right=882, rows=1000)
    judged = verdicts(Budget(speedup=EASY, retain=0.98), measured, BASE)["retention"]
    assert (judged.verdict, judged.passes, judged.needed) == ("undecided", True, None)


def test_the_baseline_against_itself_keeps_everything_exactly() -> None:
    judged = verdicts(Budget(speedup=1.0, retain=1.0), BASE, BASE)
    assert {j.verdict for j in judged.values()} == {"met"}
    assert verdicts(Budget(speedup=1.001), BASE, BASE)["speedup"].verdict == "missed"


@pytest.mark.parametrize("budget", [Budget(speedup=2.0), Budget(p99_ms=100.0)])
def test_measurements_of_different_runs_are_refused(budget: Budget) -> None:
    other = a_measurement(samples_ms=latencies(), right=900, rows=1000, key="run-2")
    with pytest.raises(MeasurementError, match="different runs"):
        judge(budget, other, BASE)


def test_measurements_of_different_rows_are_refused() -> None:
    with pytest.raises(MeasurementError, match="same rows"):
        judge(Budget(p99_ms=100.0), a_measurement(samples_ms=latencies(), right=9, rows=10), BASE)


def a_judgement(verdict: Verdict, criterion: str = "speedup", passes: bool = True) -> Judgement:
    return Judgement(criterion=criterion, verdict=verdict, passes=passes, reason=f"{criterion}: {verdict}")


@pytest.mark.parametrize(
    ("given", "worst"),
    [
        (("met", "met"), "met"),
        (("met", "undecided"), "undecided"),
        (("undecided", "missed"), "missed"),
        (("missed", "met"), "missed"),
    ],
)
def test_an_assessment_is_as_good_as_its_worst_judgement(given: tuple[Verdict, ...], worst: Verdict) -> None:
    found = Assessment(judgements=tuple(a_judgement(verdict) for verdict in given))
    assert found.verdict == worst
    assert found.reasons == tuple(f"speedup: {verdict}" for verdict in given)


def test_latency_is_met_whatever_the_retention() -> None:
    retention, fast = a_judgement("missed", "retention", passes=False), a_judgement("met", "p99_ms")
    found = Assessment(judgements=(fast, retention))
    assert found.latency_met
    assert not found.passes
    assert not Assessment(judgements=(fast, a_judgement("undecided", "speedup"), retention)).latency_met
    assert Assessment(judgements=(fast, a_judgement("undecided", "speedup"))).passes
