"""Golden logits: what a folder answered when it was made, on which machine, to be compared with what it answers here.

Integer and bfloat16 arithmetic differ between CPUs, and kernels between versions of a runtime, so a folder that is
intact can still answer differently. The logits of fixed texts tell whether it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from hasten.errors import ArtifactError, ParityError
from hasten.measurement import library_versions, this_host
from hasten.runtime import Runtime, open_runtime, predict_logits
from hasten.variant import GOLDEN, IN_BFLOAT16, Format, Manifest, Variant, seal

GOLDEN_TOLERANCE = 1e-3
BFLOAT16_TOLERANCE = 0.05  # sums that more threads share are rounded otherwise, at logits of 4 to 8 by 0.03 a time
BFLOAT16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}
GOLDEN_TEXTS = (
    "ok",
    "The delivery came two days late, but the support team was friendly and solved it.",
    "Prix : 12,50 € — naïve café, 東京, ünïcode and 1234567890!",
    "the first half of this long sentence is about nothing in particular " * 6,
)
RUNTIMES: dict[Format, tuple[str, ...]] = {
    "torch": ("torch", "transformers", "tokenizers", "tokie"),
    "onnx": ("onnxruntime", "tokenizers", "tokie"),
    "openvino": ("openvino", "tokenizers", "tokie"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What logits can depend on besides the folder.

    Attributes:
        cpu: Model name of the processor.
        instructions: Vector instruction sets that matter here, such as `avx2` or `avx512_vnni`.
        versions: Versions of the runtime and the tokenizer.
        cores: Cores at hand (affinity, cut by the cgroup's CPU quota); None in folders that do not say.
    """

    cpu: str
    instructions: tuple[str, ...]
    versions: dict[str, str]
    cores: float | None = None

    @classmethod
    def here(cls, kind: Format) -> Self:
        """This machine, for variants of a format."""
        host = this_host()
        versions = library_versions(RUNTIMES[kind])
        return cls(cpu=host.cpu, instructions=host.instructions, cores=host.cores, versions=versions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """Texts, the logits they gave when the folder was made, and where that was.

    Attributes:
        machine: Where.
        texts: The texts.
        logits: One row a text; shape [texts, labels].
        threads: Threads of the inference.
    """

    machine: Machine
    texts: tuple[str, ...]
    logits: tuple[tuple[float, ...], ...]
    threads: int = 1

    @classmethod
    def record(cls, runtime: Runtime, kind: Format) -> Self:
        """Runs the fixed golden texts, one at a time and on one thread."""
        logits = predict_logits(runtime, GOLDEN_TEXTS)
        if not np.isfinite(logits).all():
            raise ParityError("the model answers NaN or infinity on ordinary text; its weights are broken")
        rows = tuple(tuple(map(float, row)) for row in logits)
        return cls(machine=Machine.here(kind), threads=1, texts=GOLDEN_TEXTS, logits=rows)


def finish(draft: Path, manifest: Manifest) -> Manifest:
    """Records golden logits into a complete draft folder and seals it.

    Args:
        draft: The folder, with weights, configuration and tokenizer.
        manifest: What to write into `variant.json`; its `files` is replaced.

    Returns:
        The manifest as written.

    Raises:
        ParityError: The model answers NaN or infinity.
    """
    runtime = open_runtime(Variant(path=draft, manifest=manifest), threads=1)
    golden = Golden.record(runtime, manifest.format)
    (draft / GOLDEN).write_bytes(msgspec.json.encode(golden) + b"\n")
    return seal(draft, manifest)


def replay_golden(variant: Variant, *, threads: int = 1) -> float:
    """Runs a variant's golden texts again and compares.

    Args:
        variant: An opened folder.
        threads: Threads to run with.

    Returns:
        Largest absolute difference of a logit.

    Raises:
        ArtifactError: There is nothing to replay.
        ParityError: The difference is above `GOLDEN_TOLERANCE`, or in bfloat16 above `BFLOAT16_TOLERANCE`.
    """
    golden = _read(variant)
    now, then = predict_logits(open_runtime(variant, threads=threads), golden.texts), np.asarray(golden.logits)
    if now.shape != then.shape or not now.size:
        raise ArtifactError(
            f"{variant.path}: logits of shape {list(then.shape)} were recorded, it gives {list(now.shape)}; "
            "rebuild the folder"
        )
    difference = float(np.abs(now - then.astype(np.float32)).max())
    tolerance = BFLOAT16_TOLERANCE if variant.manifest.precision in IN_BFLOAT16 else GOLDEN_TOLERANCE
    if not difference <= tolerance:
        raise ParityError(
            f"{variant.path}: logits differ by {difference:.2g} from those recorded when the folder was made "
            f"(at most {tolerance:g}); {' '.join(other_machine(variant)) or 'the machine is the same'}"
        )
    return difference


def other_machine(variant: Variant) -> Sequence[str]:
    """In which ways this machine is not the one that a folder was made on, and what that means.

    Args:
        variant: An opened folder.

    Returns:
        Sentences; none where nothing differs.

    Raises:
        ArtifactError: The folder has no golden logits.
    """
    then, now = _read(variant).machine, Machine.here(variant.manifest.format)
    found: list[str] = []
    idle = set[str]() if variant.manifest.precision in IN_BFLOAT16 else BFLOAT16_INSTRUCTIONS
    used = [[one for one in machine.instructions if one not in idle] for machine in (then, now)]
    if used[0] != used[1]:
        before, after = (", ".join(instructions) or "none that is known" for instructions in used)
        found.append(
            f"It was made with the instructions {before}, this CPU has {after}: products in INT8 or bfloat16 can round "
            "and saturate differently, so measure its accuracy here."
        )
    if then.cpu != now.cpu or then.cores not in (None, now.cores):
        before, after = (f"{machine.cpu} ({machine.cores or 'unknown'} cores)" for machine in (then, now))
        found.append(f"It was made on {before}, this is {after}: latencies differ, so measure them here.")
    for name in sorted(then.versions.keys() | now.versions.keys()):
        before, after = then.versions.get(name, "none"), now.versions.get(name, "none")
        if before != after:
            found.append(f"It was made with {name} {before}, here is {after}: logits and latencies can differ.")
    return found


def _read(variant: Variant) -> Golden:
    try:
        return msgspec.json.decode((variant.path / GOLDEN).read_bytes(), type=Golden)
    except (OSError, msgspec.MsgspecError) as error:
        raise ArtifactError(f"{variant.path}: no golden logits to replay: {error}") from error
