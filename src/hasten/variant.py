"""A variant: one runnable model in one folder, in the Hugging Face layout, plus `variant.json`.

```
config.json  tokenizer.json  tokenizer_config.json      as transformers reads them
model.safetensors | model.onnx | openvino_model.xml     the weights, or the graph with its weights (OpenVINO: and .bin)
golden.json                                             texts and the logits they gave when the folder was made
variant.json                                            what this module reads: kind, labels, lineage, sha256 per file
```

A folder is written aside and renamed, so a folder that exists is whole. `open_variant` checks every hash before
any file is parsed by anything else.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from hasten.errors import ArtifactError, HastenError, UsageError
from hasten.files import beside, file_sha256, is_left_over, read_document, write_atomically

SCHEMA = "hasten.variant/1"
RUN = "run.json"  # of a folder that holds variants
MANIFEST, GOLDEN = "variant.json", "golden.json"
PLAIN_NAME = re.compile(r"[^./\\\x00][^/\\\x00]*")
CONFIGURATION = ("config.json", "tokenizer.json", "tokenizer_config.json")

Task = Literal["single_label_classification", "multi_label_classification", "regression", "token_classification"]
Format = Literal["torch", "onnx", "openvino"]
Precision = Literal["fp32", "bf16", "int8", "int8+bf16"]
IN_BFLOAT16: dict[Precision, Precision] = {"bf16": "fp32", "int8+bf16": "int8"}  # of the same graph without bfloat16
WEIGHTS: dict[Format, tuple[str, ...]] = {
    "torch": ("model.safetensors",),
    "onnx": ("model.onnx",),
    "openvino": ("openvino_model.xml", "openvino_model.bin"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Number of weights, by part of the model.

    Attributes:
        embedding: Weights of the token, position and type tables.
        encoder: Weights of the transformer layers.
        head: Weights of the pooler and the classifier.
    """

    embedding: int
    encoder: int
    head: int

    @property
    def total(self) -> int:
        """All weights."""
        return self.embedding + self.encoder + self.head


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """How a variant came to be.

    Attributes:
        name: The step's verb: `import`, `init`, `train`, `distill`, `export`, `quantize` or `convert`.
        parent: Digest of the variant it was made from; None for an import.
        options: The step's options, as resolved.
        versions: Versions of the libraries that did the work.
        facts: What the step measured while it proved its result (parity, fused operators, losses).
    """

    name: str
    parent: str | None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    versions: dict[str, str] = field(default_factory=dict[str, str])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One way to share out the cores, measured.

    Attributes:
        workers: Inferences at the same time.
        threads: Threads of each.
        alone_p50_ms: Median latency of a text that comes alone, from text to scores.
        texts_per_s: Texts a second when as many clients ask as there are inferences at the same time.
    """

    workers: int
    threads: int
    alone_p50_ms: float
    texts_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadPlan:
    """What a measurement says about sharing out a machine's cores.

    Attributes:
        cpu: Model name of the processor.
        cores: Cores at hand (affinity, cut by the cgroup's CPU quota).
        rows: The ways, at least one.
    """

    cpu: str
    cores: float
    rows: list[PlanRow]

    def is_of(self, cpu: str, cores: float) -> bool:
        """Whether it was measured on such a processor with as many cores."""
        return (self.cpu, self.cores) == (cpu, cores)

    @property
    def for_latency(self) -> PlanRow:
        """The way that answers a text alone soonest."""
        return min(self.rows, key=lambda row: row.alone_p50_ms)

    @property
    def for_throughput(self) -> PlanRow:
        """The way that answers most texts a second."""
        return max(self.rows, key=lambda row: row.texts_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `variant.json`.

    Attributes:
        schema: `hasten.variant/1`.
        name: The variant's name, such as `onnx-int8`; files are named after it, so it has no slash.
        task: What the logits mean.
        format: `torch` (safetensors), `onnx` or `openvino`.
        precision: `fp32`; `bf16`; `int8`; or `int8+bf16`, whose products are INT8 and the rest bfloat16. bfloat16 is a
            way to run the graph of an OpenVINO variant, which stays as it is.
        architecture: transformers' `model_type`.
        labels: Label names by id.
        max_tokens: Longest input in tokens, special tokens included; longer texts are truncated.
        parameters: Weights by part.
        batch_invariant: Whether a text's logits are the same alone and in any batch.
        step: How it was made.
        files: sha256 (hex) of every other file in the folder, by relative path.
        plan: How to share out the cores, where it was measured.
    """

    schema: str
    name: str
    task: Task
    format: Format
    precision: Precision
    architecture: str
    labels: list[str]
    max_tokens: int
    parameters: Parameters
    batch_invariant: bool
    step: StepRecord
    files: dict[str, str] = field(default_factory=dict[str, str])
    plan: ThreadPlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A runnable model on disk.

    Attributes:
        path: The folder.
        manifest: The content of its `variant.json`.
    """

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.manifest.name

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names by id."""
        return tuple(self.manifest.labels)

    @property
    def digest(self) -> str:
        """sha256 (hex) over the files' hashes, and bfloat16, which no file tells: the identity of what runs."""
        precision = self.manifest.precision
        lines = [f"{name} {value}\n" for name, value in sorted(self.manifest.files.items())]
        lines += [f"{precision}\n"] if precision in IN_BFLOAT16 else []
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Size of the weights, with the graph where the format has one."""
        return sum((self.path / name).stat().st_size for name in WEIGHTS[self.manifest.format])

    @property
    def weights(self) -> str:
        """Name of the file to load."""
        return WEIGHTS[self.manifest.format][0]


def open_variant(path: Path | str) -> Variant:
    """Opens a folder and checks the hash of every file it names.

    Args:
        path: The folder, or a link to it.

    Returns:
        The variant; its `path` has links resolved.

    Raises:
        ArtifactError: The folder is missing, incomplete, altered, or written by another schema.
    """
    folder = Path(path).resolve()
    manifest = _read_manifest(folder)
    if strangers := _strangers(folder, manifest.files):
        raise ArtifactError(
            f"{folder}: file not named in {MANIFEST}: {', '.join(sorted(strangers))}; rebuild the folder"
        )
    _require_whole_graph(folder, manifest)
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected)
    return Variant(path=folder, manifest=manifest)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; a run that chose no variant says why in its report.md")
    if not path.is_file():
        what = "a run; name its folder `chosen`, or one in `variants`" if (folder / RUN).is_file() else (
            f"no {MANIFEST}; not a folder that hasten made (import a checkpoint first)"
        )  # fmt: skip
        raise ArtifactError(f"{folder}: {what}")
    manifest = read_document(path, Manifest, SCHEMA, ArtifactError)
    if not PLAIN_NAME.fullmatch(manifest.name):
        raise ArtifactError(f"{path}: the name {manifest.name!r} has a slash or begins with a dot")
    return manifest


def _require_whole_graph(folder: Path, manifest: Manifest) -> None:
    """An ONNX graph may name files for its weights, which are read wherever they link to; hasten's hold them all."""
    parts = {*CONFIGURATION, *WEIGHTS["onnx"], GOLDEN}
    if manifest.format == "onnx" and (others := manifest.files.keys() - parts):
        raise ArtifactError(
            f"{folder}: {', '.join(sorted(others))}: no file of an ONNX variant, whose weights are all in "
            f"{WEIGHTS['onnx'][0]}; rebuild the folder"
        )


def _strangers(folder: Path, known: Collection[str]) -> set[str]:
    """Files of a variant folder that its manifest does not name."""
    present = {
        str(p.relative_to(folder)) for p in folder.rglob("*")
        if (p.is_symlink() or not p.is_dir()) and not is_left_over(p, folder / MANIFEST)
    }  # fmt: skip
    return present - {MANIFEST, *known}


def _check_file(folder: Path, name: str, expected: str) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder) or path.is_symlink():
        raise ArtifactError(f"{folder}: {name!r} points outside the folder")
    if not path.is_file():
        raise ArtifactError(f"{folder}: {name} is missing")
    if file_sha256(path) != expected:
        raise ArtifactError(f"{folder}: {name} is not the file that was written (sha256 differs); rebuild the folder")


@contextmanager
def building(out: Path) -> Generator[Path]:
    """A folder written aside, moved to `out` when the block ends without an error, removed otherwise.

    Args:
        out: Where the finished folder shall stand; a variant folder that stands there is replaced.

    Yields:
        The draft folder to write into.

    Raises:
        ArtifactError: The folder cannot be written, for want of room or rights.
        UsageError: Something else than a variant stands there.
    """
    check_place(out)
    out = out.resolve()
    draft = beside(out)
    try:
        draft.mkdir(parents=True)
        yield draft
        check_place(out)
        _replace_folder(draft, out)
    except HastenError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or "(os error" in str(error):  # as the Rust libraries report theirs
            raise ArtifactError(f"{out}: cannot be written: {error}; make room, or choose another folder") from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_place(out: Path) -> None:
    """Refuses to put a variant where something stands that is not hasten's to replace.

    Args:
        out: Where a finished folder shall stand.

    Raises:
        UsageError: There is a file, a link, or a folder with other things in it than a variant; or it is inside
            another variant, which would then hold what it does not know.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out}: is a file or a link; name a new folder, or one that holds a variant")
    if out.is_dir() and (others := _strangers(out, _named_files(out))):
        some = ", ".join(sorted(others)[:5])
        raise UsageError(
            f"{out}: holds other things than a variant, which would be lost ({some}); move them or name another folder"
        )
    if outer := next((parent for parent in out.resolve().parents if (parent / MANIFEST).is_file()), None):
        raise UsageError(f"{out}: is inside the variant {outer}; name a folder beside it")


def _named_files(folder: Path) -> set[str]:
    """The files that a folder's manifest names; of a damaged one, those of any variant; none where there is none."""
    try:
        return set(msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Files).files)
    except FileNotFoundError:
        return set()
    except (OSError, msgspec.MsgspecError):
        return {*CONFIGURATION, *(name for names in WEIGHTS.values() for name in names), GOLDEN}


class _Files(msgspec.Struct):
    files: dict[str, str]


def _replace_folder(draft: Path, out: Path) -> None:
    if out.exists():
        old = beside(out, "old")
        out.rename(old)
        draft.rename(out)
        shutil.rmtree(old)
    else:
        draft.rename(out)


def seal(draft: Path, manifest: Manifest) -> Manifest:
    """Hashes every file in a draft folder and writes its `variant.json`.

    Args:
        draft: The folder, complete but for the manifest.
        manifest: What to write; its `files` is replaced.

    Returns:
        The manifest as written.
    """
    files = {str(p.relative_to(draft)): file_sha256(p) for p in sorted(draft.rglob("*")) if p.is_file()}
    files.pop(MANIFEST, None)
    sealed = replace(manifest, files=files)
    write_atomically(draft / MANIFEST, msgspec.json.format(msgspec.json.encode(sealed), indent=2) + b"\n")
    return sealed


def copy_configuration(source: Variant, draft: Path) -> None:
    """Copies the configuration and the tokenizer, which every variant of a model shares."""
    for name in CONFIGURATION:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, draft / name)
