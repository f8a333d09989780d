"""How cores are shared out: the ways, the measurement, and what the server makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.checkpoint import import_checkpoint
from hasten.cores import available_cores
from hasten.errors import DataError, UsageError
from hasten.measurement import this_host
from hasten.onnx_export import export
from hasten.profiling import Worker
from hasten.profiling_worker import Reply
from hasten.runtime import Logits, OnnxRuntime, open_runtime
from hasten.serve_options import ServeOptions
from hasten.thread_plan import layouts, measure_plan, record_plan
from hasten.variant import PlanRow, ThreadPlan, open_variant


@given(st.floats(0.1, 128))
def test_every_way_uses_the_cores_at_hand(cores: float) -> None:
    ways = layouts(cores)
    assert all(abs(workers * threads - cores) < 1 or workers * threads == 1 for workers, threads in ways)
    assert min(workers for workers, _ in ways) == 1
    assert any(threads == 1 for _, threads in ways)


@pytest.mark.parametrize(
    ("cores", "expected"),
    [(0.5, [(1, 1)]), (1.5, [(1, 1), (1, 2), (2, 1)]), (4, [(1, 4), (2, 2), (4, 1)]), (3, [(1, 3), (3, 1)])],
)
def test_ways(cores: float, expected: list[tuple[int, int]]) -> None:
    assert layouts(cores) == expected


def plan(cpu: str, cores: float) -> ThreadPlan:
    rows = [
        PlanRow(workers=1, threads=2, alone_p50_ms=3.0, texts_per_s=300.0),
        PlanRow(workers=2, threads=1, alone_p50_ms=4.0, texts_per_s=400.0),
    ]
    return ThreadPlan(cpu=cpu, cores=cores, rows=rows)


def test_server_follows_the_plan_of_a_machine_like_this() -> None:
    here = plan(this_host().cpu, available_cores())
    assert here.for_throughput.workers == 2
    assert ServeOptions().layout(here) == (1, 2)


def test_server_leaves_a_plan_of_another_machine() -> None:
    whole = max(1, int(available_cores()))
    for other in (plan("another", available_cores()), plan(this_host().cpu, 1024), None):
        assert ServeOptions().layout(other) == (1, whole)


def test_flags_go_before_the_plan() -> None:
    here, whole = plan(this_host().cpu, available_cores()), max(1, int(available_cores()))
    assert ServeOptions(threads=3).layout(here) == (1, 3)
    assert ServeOptions(workers=whole).layout(here) == (whole, 1)
    assert ServeOptions(workers=2, threads=5).layout(here) == (2, 5)


@pytest.mark.parametrize("name", ["threads", "workers", "processes"])
@pytest.mark.parametrize("number", [0, -1])
def test_none_at_all_is_no_layout(name: str, number: int) -> None:
    with pytest.raises(UsageError, match=f"--{name} is at least 1, not {number}"):
        ServeOptions(**{name: number})


def test_a_plan_is_measured_and_kept_in_the_folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = import_checkpoint(str(checkpoint("bert")), tmp_path / "torch-fp32")
    variant = export(source, tmp_path / "onnx-fp32")
    seen: list[tuple[int, int]] = []
    measured = measure_plan(
        variant, ["the food was great", "awful room"], lambda done, total: seen.append((done, total))
    )
    assert [(row.workers, row.threads) for row in measured.rows] == layouts(available_cores())
    assert all(row.alone_p50_ms > 0 and row.texts_per_s > 0 for row in measured.rows)
    assert seen[-1][0] == seen[-1][1]
    record_plan(variant, measured)
    again = open_variant(variant.path)
    assert again.manifest.plan == measured
    assert again.digest == variant.digest


@pytest.mark.parametrize(("threads", "workers", "sessions"), [(1, 2, 1), (2, 1, 1), (2, 2, 3)])
def test_inferences_of_several_threads_at_the_same_time_share_no_threads(
    threads: int, workers: int, sessions: int, checkpoint: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    opened, session = list[int](), ort.InferenceSession

    def noted(*arguments: Any, **named: Any) -> Any:
        opened.append(1)
        return session(*arguments, **named)

    variant = export(import_checkpoint(str(checkpoint("bert")), tmp_path / "torch-fp32"), tmp_path / "onnx-fp32")
    monkeypatch.setattr(ort, "InferenceSession", noted)
    runtime, together = open_runtime(variant, threads=threads, workers=workers), Barrier(2)

    def asks(text: str) -> Logits:
        together.wait(10)
        return np.concatenate([runtime.infer(runtime.encode([text])) for _ in range(3)])

    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(asks, ["the food was great", "awful room"])]
    assert len(opened) == sessions
    alone = OnnxRuntime(variant, threads=threads)
    for logits, text in zip(found, ["the food was great", "awful room"], strict=True):
        np.testing.assert_allclose(logits, np.repeat(alone.infer(alone.encode([text])), 3, axis=0), atol=1e-6)


def test_a_variants_memory_is_not_that_of_who_measures_it(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    variant = export(import_checkpoint(str(checkpoint("bert")), tmp_path / "torch-fp32"), tmp_path / "onnx-fp32")
    ballast = np.ones(100_000_000)
    with Worker(variant, 1) as worker:
        found = worker.classify(["the food was great"]).peak_memory_bytes
    assert 10_000_000 < found < ballast.nbytes


def test_a_plan_is_of_texts_from_all_over_the_file(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, classify = set[str](), Worker.classify

    def noted(self: Worker, texts: Sequence[str], **named: Any) -> Reply:
        asked.update(texts)
        return classify(self, texts, **named)

    monkeypatch.setattr(Worker, "classify", noted)
    variant = export(import_checkpoint(str(checkpoint("bert")), tmp_path / "torch-fp32"), tmp_path / "onnx-fp32")
    texts = [f"the food was {row}" for row in range(2_000)]
    measure_plan(variant, texts)
    assert len(asked) == 200
    assert len(asked & set(texts[:1_000])) < 150


def test_no_texts_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = import_checkpoint(str(checkpoint("bert")), tmp_path / "torch-fp32")
    with pytest.raises(DataError, match="none were given"):
        measure_plan(source, [])
