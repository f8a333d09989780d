"""Measurements: JSON there and back, statistics from raw samples, comparisons only within one run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hasten import intervals
from hasten.cores import available_cores, cpu_quota
from hasten.errors import MeasurementError
from hasten.measurement import (
    Host,
    Latency,
    Measurement,
    Quality,
    Scenario,
    library_versions,
    load_measurement,
    save_measurement,
    speedup,
    this_host,
)  # fmt: skip
from hasten.variant import Parameters

HOST = Host(cpu="Test CPU", cores=2, instructions=("avx2",), memory_bytes=8, system="Linux", python="3.12", versions={})
SCENARIO = Scenario(name="test", split="test", workload_digest="ab", threads=1, warmup=2, key="run-1")


def a_measurement(samples_ms: list[float], *, variant: str = "onnx-int8", key: str = "run-1") -> Measurement:
    latency = Latency(
        samples_ms=tuple(samples_ms), tokens=tuple(range(len(samples_ms))), tokenizer_ms=(0.1,) * len(samples_ms)
    )
    return Measurement(
        schema="hasten.measurement/1", variant=variant, digest="cd", format="onnx", precision="int8",
        parameters=Parameters(embedding=3, encoder=2, head=1), size_bytes=10, peak_memory_bytes=20, host=HOST,
        scenario=replace(SCENARIO, key=key), latency=latency,
        quality=Quality(predictions=(0, 1, 1), expected=(0, 1, 0)), breakdown_ms={"attention": 0.25},
    )  # fmt: skip


def test_a_measurement_comes_back_as_it_was(tmp_path: Path) -> None:
    made = a_measurement([1.0, 0.1 + 0.2, 1e-7, 123456.789])
    path = save_measurement(made, tmp_path / "measurements")
    assert path == tmp_path / "measurements" / "onnx-int8.test.json"
    assert load_measurement(path) == made
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated"),
        (b"\xff\xfe", "malformed"),
        (b"[1, 2]", "object"),
        (b'{"schema": "hasten.measurement/1"}', "missing required field"),
    ],
)
def test_what_is_no_measurement_is_refused_by_name(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(MeasurementError, match=says) as caught:
        load_measurement(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_foreign_measurement_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="No such file"):
        load_measurement(tmp_path / "none.json")
    path = save_measurement(a_measurement([1.0]), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": "hasten.measurement/2"}))
    with pytest.raises(MeasurementError, match=r"schema is 'hasten.measurement/2'"):
        load_measurement(path)


def test_speedup_is_the_ratio_of_medians() -> None:
    base, fast = a_measurement([8.0, 10.0, 12.0], variant="torch-fp32"), a_measurement([2.0, 2.5, 3.0])
    assert speedup(base, fast).value == 4
    assert speedup(base, fast) == intervals.median_ratio(base.latency.samples_ms, fast.latency.samples_ms)


def test_speedup_across_runs_is_refused_by_name() -> None:
    base = a_measurement([8.0, 10.0], variant="torch-fp32", key="run-1")
    with pytest.raises(MeasurementError, match="onnx-int8 and torch-fp32 were measured in different runs"):
        speedup(base, a_measurement([2.0, 2.5], key="run-2"))


def test_accuracy_counts_right_rows() -> None:
    quality = Quality(predictions=(0, 1, 1, 2), expected=(0, 1, 0, 2))
    assert quality.right.tolist() == [True, True, False, True]
    assert quality.n == 4
    assert quality.accuracy() == intervals.proportion(3, 4)


def test_retention_pairs_rows() -> None:
    base = Quality(predictions=(0, 1, 1, 2), expected=(0, 1, 0, 2))
    new = Quality(predictions=(0, 0, 1, 2), expected=(0, 1, 0, 2))
    assert new.retention(base, level=0.9) == intervals.paired_ratio(new.right, base.right, level=0.9)
    assert new.retention(base).value == pytest.approx(2 / 3)


def test_retention_on_other_rows_or_of_nothing_is_refused() -> None:
    base = Quality(predictions=(0, 1), expected=(0, 1))
    with pytest.raises(MeasurementError, match="same rows"):
        base.retention(replace(base, expected=(1, 0)))
    hopeless = Quality(predictions=(1, 0), expected=(0, 1))
    with pytest.raises(MeasurementError, match="0 of 2 rows right"):
        base.retention(hopeless)


def test_latency_by_length_covers_every_sample_once_in_order_of_length() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(4, 100, 203)
    latency = Latency(
        samples_ms=tuple((tokens / 10).tolist()), tokens=tuple(tokens.tolist()), tokenizer_ms=(0.0,) * 203
    )
    rows = latency.by_length(5)
    assert sum(row.n for row in rows) == 203
    assert max(row.n for row in rows) - min(row.n for row in rows) <= 1
    assert (rows[0].low_tokens, rows[-1].high_tokens) == (tokens.min(), tokens.max())
    assert [row.p50_ms.value for row in rows] == sorted(row.p50_ms.value for row in rows)
    assert all(row.low_tokens <= row.p50_ms.value * 10 <= row.high_tokens for row in rows)


def test_latency_by_length_of_fewer_samples_than_groups() -> None:
    latency = Latency(samples_ms=(3.0, 1.0), tokens=(9, 4), tokenizer_ms=(0.0, 0.0))
    assert [(row.low_tokens, row.p50_ms.value, row.n) for row in latency.by_length(5)] == [(4, 1.0, 1), (9, 3.0, 1)]


def test_latency_statistics_come_from_the_samples() -> None:
    latency = Latency(samples_ms=(4.0, 2.0, 9.0), tokens=(1, 1, 1), tokenizer_ms=(0.0, 0.0, 0.0))
    assert latency.percentile(50) == intervals.percentile(np.asarray([4.0, 2.0, 9.0]), 50)
    effect = intervals.design_effect(np.asarray([4.0, 2.0, 9.0]))
    assert latency.mean() == intervals.mean(np.asarray([4.0, 2.0, 9.0]), effect=effect)


def test_a_latency_that_comes_in_stretches_is_less_certain_than_the_same_in_a_random_order() -> None:
    generator = np.random.default_rng(0)
    stretches = np.repeat(generator.choice([4.0, 7.0], 20), 50) * generator.lognormal(0, 0.05, 1000)

    def width(interval: intervals.Interval) -> float:
        assert interval.lower is not None and interval.upper is not None
        return interval.upper - interval.lower

    def latency(samples: np.ndarray) -> Latency:
        return Latency(samples_ms=tuple(samples.tolist()), tokens=(5,) * 1000, tokenizer_ms=(0.0,) * 1000)

    together, shuffled = latency(stretches), latency(generator.permutation(stretches))
    assert width(together.mean()) > 3 * width(shuffled.mean())
    for one in (lambda x: x.percentile(95), lambda x: x.percentile_bounds(95), lambda x: x.by_length(1)[0].p50_ms):
        assert width(one(together)) > 1.2 * width(one(shuffled))


def test_the_host_is_described() -> None:
    host = this_host()
    assert host.cpu
    assert 0 < host.cores == available_cores()
    assert host.memory_bytes > 10**8
    assert {"hasten", "numpy", "scipy"} <= set(host.versions)


@pytest.mark.parametrize(
    ("groups", "quotas", "cores"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/system.slice/a:b.service\n", {"system.slice/a:b.service/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/../../other\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("4:cpu,cpuacct:/dock/x\n2:memory:/dock/x\n",
         {"cpu,cpuacct/dock/x/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/dock/x/cpu.cfs_period_us": "20000\n"}, 2.5),
        ("4:cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("4:cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "30000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.3),
        ("odd\n", {"cpu.max": "no number\n"}, math.inf),
        ("", {}, math.inf),
    ],
)  # fmt: skip
def test_a_cpu_quota_is_that_of_the_group_or_of_one_above(
    groups: str, quotas: dict[str, str], cores: float, tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text(groups)
    for name, content in quotas.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(content)
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "mounted") == cores


def test_a_quota_cuts_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.cores.cpu_quota", lambda *_: 0.5)
    assert available_cores() == 0.5
    monkeypatch.setattr("hasten.cores.cpu_quota", lambda *_: math.inf)
    assert available_cores() >= 1


def test_versions_leave_out_what_is_not_installed() -> None:
    found = library_versions(("numpy", "no-such-distribution-at-all"))
    assert found == {"numpy": np.__version__}
