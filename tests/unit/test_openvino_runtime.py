"""Which arithmetic OpenVINO is told to run a variant in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest

from hasten import openvino_runtime
from hasten.openvino_runtime import cpu_settings, has_bfloat16
from hasten.variant import IN_BFLOAT16, Precision


@pytest.mark.parametrize(("capabilities", "expected"), [(["BF16", "FP32", "INT8"], True), (["FP32", "INT8"], False)])
def test_openvino_says_whether_the_cpu_has_bfloat16(
    capabilities: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(device: str, name: str) -> Any:
        return {("CPU", "OPTIMIZATION_CAPABILITIES"): capabilities}[device, name]

    core = SimpleNamespace(get_property=asked)
    monkeypatch.setattr(openvino_runtime, "load_openvino", lambda: SimpleNamespace(Core=lambda: core))
    assert has_bfloat16() is expected


@pytest.mark.parametrize(("threads", "workers", "pinned"), [(4, 1, True), (1, 4, True), (2, 1, False), (1, 1, False)])
def test_threads_are_pinned_where_no_other_process_would_take_the_same_cores(
    threads: int, workers: int, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_runtime, "cores_by_affinity", lambda: 4)
    assert cpu_settings(threads=threads, workers=workers, precision="fp32")["ENABLE_CPU_PINNING"] is pinned


def test_nothing_runs_in_bfloat16_but_what_is_called_so() -> None:
    hints: dict[Precision, str] = {
        precision: cpu_settings(threads=1, precision=precision)["INFERENCE_PRECISION_HINT"]
        for precision in get_args(Precision)
    }
    assert hints == {"fp32": "f32", "bf16": "bf16", "int8": "f32", "int8+bf16": "bf16"}
    assert {precision for precision, hint in hints.items() if hint == "bf16"} == IN_BFLOAT16.keys()
