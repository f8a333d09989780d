"""A variant's `openvino_model.xml` in OpenVINO on the CPU. Needs the extra `openvino`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.cores import cores_by_affinity
from hasten.errors import ArtifactError, MissingExtraError
from hasten.tokenization import Encoding, TextEncoder, pad_token_id, padded
from hasten.variant import IN_BFLOAT16, Precision, Variant


class OpenVinoRuntime:
    """One compiled model; each thread that calls it has an inference request of its own."""

    compiles_shapes = True

    def __init__(self, variant: Variant, *, threads: int, workers: int = 1, profile: bool = False) -> None:
        core, precision = load_openvino().Core(), variant.manifest.precision
        if precision in IN_BFLOAT16 and not has_bfloat16():
            raise ArtifactError(
                f"{variant.path}: a {precision} variant, but OpenVINO does not multiply bfloat16 on this CPU; use the "
                f"{IN_BFLOAT16[precision]} variant that it was made from"
            )
        settings = cpu_settings(threads=threads, workers=workers, precision=precision) | {"PERF_COUNT": profile}
        path = variant.path / "openvino_model.xml"
        try:
            self._model: Any = core.compile_model(path, "CPU", settings)
        except RuntimeError as error:
            raise ArtifactError(f"{path}: OpenVINO cannot load it: {error}") from error
        self._inputs = [node.any_name for node in self._model.inputs]
        self._requests = threading.local()
        self._encode = TextEncoder(variant)
        self._pad_id = pad_token_id(variant)
        self.labels = variant.labels

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenizes texts; see `hasten.runtime.Runtime.encode`."""
        return self._encode(texts)

    def encode_plain(self, texts: Sequence[str]) -> list[Encoding] | None:
        """Tokenizes plain texts; see `hasten.runtime.Runtime.encode_plain`."""
        return self._encode.plain(texts)

    def infer(self, encodings: Sequence[Encoding]) -> NDArray[np.float32]:
        """Runs one padded batch; see `hasten.runtime.Runtime.infer`."""
        batch = padded(encodings, self._pad_id)
        found = self._request().infer({name: batch[name] for name in self._inputs})
        return np.array(found[0], dtype=np.float32)  # the request's own buffer is written over by the next

    def node_times_ms(self) -> list[tuple[str, str, float]]:
        """Name, kind and milliseconds of each operator in this thread's last inference; needs `profile`."""
        return [
            (node.node_name, node.node_type, node.real_time.total_seconds() * 1e3)
            for node in self._request().get_profiling_info()
        ]

    def _request(self) -> Any:
        if not hasattr(self._requests, "mine"):
            self._requests.mine = self._model.create_infer_request()
        return self._requests.mine


def has_bfloat16() -> bool:
    """Whether OpenVINO multiplies bfloat16 on this CPU.

    Returns:
        What OpenVINO itself says of the CPU.

    Raises:
        MissingExtraError: openvino is not installed.
    """
    return "BF16" in load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def cpu_settings(*, threads: int, workers: int = 1, precision: Precision) -> dict[str, Any]:
    """OpenVINO's properties for a latency that is bound to so many threads.

    Args:
        threads: Threads of an inference.
        workers: Inferences at a time.
        precision: The variant's. OpenVINO would choose bfloat16 for any graph where the CPU has it; it is told, so that
            a variant runs in what it is called.

    Returns:
        Properties by name, as `Core.compile_model` takes them. Threads are pinned to cores where there is one for each,
        which spares the first inferences after a pause from sharing one. Where there are more cores than threads, other
        processes would pin theirs to the same.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": workers,
        "INFERENCE_NUM_THREADS": threads * workers,
        "INFERENCE_PRECISION_HINT": "bf16" if precision in IN_BFLOAT16 else "f32",
        "ENABLE_CPU_PINNING": threads * workers == cores_by_affinity(),
    }


def load_openvino() -> Any:
    """The module `openvino`.

    Returns:
        The module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino") from error
    return openvino
