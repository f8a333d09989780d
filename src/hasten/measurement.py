"""What was observed: raw samples and answers of one variant, under one scenario, on one host; as JSON.

A measurement never holds a verdict, and a summary is always computed from its raw samples. Latency counts text in to
scores out, tokenizer included, one text at a time.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from hasten import intervals
from hasten.cores import available_cores
from hasten.errors import MeasurementError
from hasten.files import read_document, write_atomically
from hasten.intervals import Interval
from hasten.variant import Parameters

SCHEMA = "hasten.measurement/1"
CALIBRATION_BINS = 15
GROUPS = ("tokenizer", "embeddings", "attention", "feed-forward", "normalisation", "head", "other")
VERSIONED = (
    "hasten",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "tokenizers",
    "tokie",
    "sentencepiece",
    "numpy",
    "scipy",
    "scikit-learn",
    "rapidfuzz",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine and the software.

    Attributes:
        cpu: Model name of the processor.
        cores: Cores this process may use (its affinity, cut by the cgroup's CPU quota).
        instructions: Vector instruction sets that matter here, such as `avx2` or `avx512_vnni`.
        memory_bytes: Memory of the machine.
        system: Operating system and kernel.
        python: Python's version.
        versions: Versions of the libraries that take part.
    """

    cpu: str
    cores: float
    instructions: tuple[str, ...]
    memory_bytes: int
    system: str
    python: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Under what conditions a measurement was taken.

    Attributes:
        name: Such as `valid-export` or `test`; part of the file's name.
        split: Which split the texts come from: `valid` or `test`.
        workload_digest: Identity of the texts and labels.
        threads: Threads a variant may use.
        warmup: Requests at the start of each block that are not counted.
        key: Identity of the interleaved run; only measurements with equal keys may be compared.
    """

    name: str
    split: str
    workload_digest: str
    threads: int
    warmup: int
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Raw latencies of single-text requests, in the order taken.

    Attributes:
        samples_ms: Milliseconds from text to scores; shape [samples].
        tokens: Length in tokens of each sample's text; shape [samples].
        tokenizer_ms: The part of each sample spent in the tokenizer; shape [samples].
    """

    samples_ms: tuple[float, ...]
    tokens: tuple[int, ...]
    tokenizer_ms: tuple[float, ...]

    def percentile(self, q: float) -> Interval:
        """Percentile `q` (0 to 100) in milliseconds with its distribution-free interval."""
        return _percentile(np.asarray(self.samples_ms), q)

    def percentile_bounds(self, q: float) -> Interval:
        """Percentile `q` (0 to 100) in milliseconds with its one-sided bounds."""
        samples = np.asarray(self.samples_ms)
        return intervals.percentile_bounds(samples, q, effect=intervals.percentile_effect(samples, q))

    def mean(self) -> Interval:
        """Mean in milliseconds with its interval."""
        samples = np.asarray(self.samples_ms)
        return intervals.mean(samples, effect=intervals.design_effect(samples))

    def by_length(self, bins: int = 5) -> list[LengthRow]:
        """Median latency in groups of about equal size, from the shortest texts to the longest."""
        order = np.argsort(self.tokens, kind="stable")
        samples, tokens = np.asarray(self.samples_ms), np.asarray(self.tokens)
        parts = [np.sort(part) for part in np.array_split(order, bins) if len(part)]
        return [_length_row(tokens[part], samples[part]) for part in parts]


def _percentile(samples: NDArray[np.float64], q: float) -> Interval:
    """Of samples in the order taken."""
    return intervals.percentile(samples, q, effect=intervals.percentile_effect(samples, q))


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRow:
    """Latency of the texts in a range of lengths.

    Attributes:
        low_tokens: Shortest.
        high_tokens: Longest.
        p50_ms: Median latency with its interval.
        n: Number of samples.
    """

    low_tokens: int
    high_tokens: int
    p50_ms: Interval
    n: int


def _length_row(tokens: NDArray[np.int64], samples: NDArray[np.float64]) -> LengthRow:
    middle = _percentile(samples, 50)
    return LengthRow(low_tokens=int(tokens.min()), high_tokens=int(tokens.max()), p50_ms=middle, n=len(samples))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A variant's answers on a labelled split.

    Attributes:
        predictions: Label id answered for each row; shape [rows].
        expected: Label id of each row; shape [rows].
        confidences: Probability of each answer, 0 to 1; shape [rows], or empty where they were not recorded.
    """

    predictions: tuple[int, ...]
    expected: tuple[int, ...]
    confidences: tuple[float, ...] = ()

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each row's answer is right; shape [rows]."""
        return np.asarray(self.predictions) == np.asarray(self.expected)

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.expected)

    def accuracy(self) -> Interval:
        """Share of right answers (0 to 1) with Wilson's interval."""
        return intervals.proportion(int(self.right.sum()), self.n)

    def calibration_error(self) -> float | None:
        """Expected calibration error: how far confidence is from accuracy, 0 to 1; None without confidences.

        Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2, with their 15 bins.
        """
        if not self.confidences:
            return None
        confidences = np.asarray(self.confidences)
        bins = np.minimum((confidences * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        gaps = np.bincount(bins, weights=self.right - confidences)
        return float(np.abs(gaps).sum() / self.n)

    def retention(self, baseline: Quality, *, level: float = intervals.TWO_SIDED) -> Interval:
        """Share of the baseline's accuracy that is retained, with its paired interval.

        Args:
            baseline: The baseline's answers on the same rows.
            level: Confidence level of the two-sided interval.

        Returns:
            accuracy / baseline accuracy.

        Raises:
            MeasurementError: The two were not measured on the same rows, or the baseline has no row right.
        """
        if self.expected != baseline.expected:
            raise MeasurementError("retention compares answers on the same rows; these two were measured on others")
        if not baseline.right.any():
            raise MeasurementError(
                f"the baseline has 0 of {self.n} rows right; are these the labels it was trained on?"
            )
        return intervals.paired_ratio(self.right, baseline.right, level=level)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Everything that was observed about one variant in one scenario.

    Attributes:
        schema: `hasten.measurement/1`.
        variant: The variant's name.
        digest: The variant's digest.
        format: `torch`, `onnx` or `openvino`.
        precision: As in the variant's manifest.
        parameters: Weights by part.
        size_bytes: Size of the weights file.
        peak_memory_bytes: Peak resident memory of the process that ran it, the interpreter and libraries included.
        host: The machine and the software.
        scenario: The conditions.
        latency: Raw latencies.
        quality: Answers on the labelled split.
        breakdown_ms: Mean milliseconds a text by group of operators (see `GROUPS`), from a run of its own under the
            profiler: shares are to be read, not sums.
    """

    schema: str
    variant: str
    digest: str
    format: str
    precision: str
    parameters: Parameters
    size_bytes: int
    peak_memory_bytes: int
    host: Host
    scenario: Scenario
    latency: Latency
    quality: Quality
    breakdown_ms: dict[str, float]

    @property
    def file_name(self) -> str:
        """`<variant>.<scenario>.json`."""
        return f"{self.variant}.{self.scenario.name}.json"


def speedup(baseline: Measurement, other: Measurement, *, level: float = intervals.TWO_SIDED) -> Interval:
    """How many times lower the median latency is, with a paired bootstrap interval.

    Args:
        baseline: The baseline, from the same interleaved run.
        other: The variant.
        level: Confidence level of the two-sided interval.

    Returns:
        p50(baseline) / p50(other).

    Raises:
        MeasurementError: The two come from different runs.
    """
    check_same_run(other, baseline)
    return intervals.median_ratio(baseline.latency.samples_ms, other.latency.samples_ms, level=level)


def check_same_run(one: Measurement, other: Measurement) -> None:
    """Refuses to compare what was not measured together.

    Args:
        one: A measurement.
        other: Another.

    Raises:
        MeasurementError: The two come from different runs.
    """
    if one.scenario.key != other.scenario.key:
        raise MeasurementError(
            f"{one.variant} and {other.variant} were measured in different runs; only one interleaved run compares"
        )


def save_measurement(measurement: Measurement, folder: Path) -> Path:
    """Writes a measurement as JSON into a folder and returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / measurement.file_name
    write_atomically(path, msgspec.json.encode(measurement) + b"\n")
    return path


def load_measurement(path: Path) -> Measurement:
    """Reads a measurement.

    Args:
        path: A file that `save_measurement` wrote.

    Returns:
        The measurement.

    Raises:
        MeasurementError: The file is not a measurement of this schema.
    """
    return read_document(path, Measurement, SCHEMA, MeasurementError)


@cache
def this_host() -> Host:
    """The machine and software at hand."""
    import psutil

    info = _cpuinfo()
    wanted = (
        "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm",
    )  # fmt: skip
    return Host(
        cpu=info.get("model name", platform.processor() or platform.machine()),
        cores=available_cores(),
        instructions=tuple(name for name in wanted if name in cpu_flags()),
        memory_bytes=psutil.virtual_memory().total,
        system=platform.platform(),
        python=platform.python_version(),
        versions=library_versions(VERSIONED),
    )


def cpu_flags() -> frozenset[str]:
    """What the CPU can do, by the names that Linux has for it; empty where that is not told."""
    info = _cpuinfo()
    return frozenset(info.get("flags", info.get("Features", "")).split())


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of the named distributions; those not installed are left out."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
