"""Import: a Hugging Face sequence classifier, from a folder or a hub, becomes the variant `torch-fp32`.

Only safetensors are read, code that comes with a checkpoint is never run, and the copy is written again by
transformers, so that what stands in the folder is what its own libraries read.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from hasten.errors import ArtifactError, MissingExtraError
from hasten.golden import finish
from hasten.measurement import library_versions
from hasten.torch_runtime import count_parameters, quiet_transformers
from hasten.variant import SCHEMA, Manifest, StepRecord, Variant, building

ARCHITECTURES = (
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta",
    "xlm-roberta",
)  # fmt: skip
OFFSET_POSITIONS = ("camembert", "mpnet", "roberta", "xlm-roberta")
DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model")
UNLIMITED_TOKENS = 100_000
MOST_BYTES = 2**31  # of a protobuf message
VERSIONED = ("torch", "transformers", "tokenizers", "safetensors")


def import_checkpoint(
    source: str, out: Path, *, name: str = "torch-fp32", new_labels: Sequence[str] | None = None, seed: int = 0
) -> Variant:
    """Copies a fine-tuned classifier into a variant folder, or an encoder that is about to be trained.

    Args:
        source: A folder in the Hugging Face layout, or a hub id as `ID[@REVISION]`.
        out: The folder to make.
        name: The variant's name.
        new_labels: Labels of a new, untrained classification head; None demands that the checkpoint has its own.
        seed: Seed of a new head's weights.

    Returns:
        The variant, with golden logits recorded.

    Raises:
        ArtifactError: The checkpoint is missing, damaged, a pickle, brings code of its own, is not a fine-tuned
            single-label classifier, or has an architecture that hasten is not proven on.
        MissingExtraError: torch or transformers is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="hasten-") as download, _naming(source, download):
        folder = _local_folder(source, Path(download))
        _check_layout(folder)
        config = _read_json(folder / "config.json")
        _check_config(folder, config, new_head=new_labels is not None)
        with building(out) as draft:
            model, tokenizer = _load(folder, config.get("id2label") or {}, new_labels, seed)
            _save(model, tokenizer, draft)
            sealed = finish(draft, _manifest(name, model, tokenizer))
    return Variant(path=out.resolve(), manifest=sealed)


@contextmanager
def _naming(source: str, download: str) -> Generator[None]:
    """Errors name what was asked for, and not the folder that it was downloaded to."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(str(error).replace(download, source)) from error


def _local_folder(source: str, download: Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ArtifactError(f"{source}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "optimize") from error
    repository, _, revision = source.partition("@")
    try:
        path = snapshot_download(
            repository, revision=revision or None, local_dir=download, allow_patterns=list(DOWNLOADED),
            ignore_patterns="*/*",  # other checkpoints and formats in folders of their own
        )  # fmt: skip
    except Exception as error:  # the hub's client raises many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ArtifactError(f"{source}: neither a folder here nor a checkpoint of the hub: {first}") from error
    return Path(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not a JSON object: {error}") from error


def _check_layout(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder}: no config.json; not a folder in the Hugging Face layout")
    if list(folder.glob("model*.safetensors")):
        return
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")):
        raise ArtifactError(
            f"{folder}: weights only as pickle ({', '.join(pickles)}), which can run code when read; "
            "save the model again with save_pretrained(...) to get model.safetensors"
        )
    raise ArtifactError(
        f"{folder}: no model.safetensors; weights that are there as pickle alone (pytorch_model.bin) are not taken "
        "from the hub, as they can run code when read"
    )


def _check_config(folder: Path, config: Mapping[str, Any], *, new_head: bool) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in _read_json(folder / name):
            raise ArtifactError(f"{folder}/{name}: 'auto_map' asks to run code from the checkpoint; hasten never does")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ArtifactError(
            f"{folder}: architecture {kind!r} has not been proven with hasten; it takes {', '.join(ARCHITECTURES)}"
        )
    if new_head:
        return
    problem, named = config.get("problem_type"), config.get("id2label") or {}
    count = len(named) or config.get("num_labels", 2)  # transformers' own default
    if problem not in (None, "single_label_classification") or count < 2:
        task = problem or "regression (one label)"
        raise ArtifactError(f"{folder}: the task is {task}; hasten takes single-label classification for now")
    if named and set(named) != {str(i) for i in range(count)}:
        raise ArtifactError(
            f"{folder}/config.json: id2label has the ids {', '.join(list(named)[:5])}; they must count from 0"
        )
    names = Counter(str(name).strip() for name in named.values())
    if twice := [name for name, count in names.items() if count > 1]:
        raise ArtifactError(
            f"{folder}/config.json: id2label has the name {twice[0]!r} twice; answers are told apart by their labels"
        )


def _load(folder: Path, named: Mapping[str, str], new_labels: Sequence[str] | None, seed: int) -> tuple[Any, Any]:
    try:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("torch with transformers", "optimize") from error
    quiet_transformers()
    torch.manual_seed(seed)
    head = {} if new_labels is None else _new_head(new_labels)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, local_files_only=True, output_loading_info=True,
            dtype=torch.float32, **head,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise ArtifactError(f"{folder}: transformers cannot load it: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing and new_labels is None:
        raise ArtifactError(
            f"{folder}: the checkpoint has no weights for {', '.join(missing[:4])}; "
            "it is not a fine-tuned sequence classifier (fine-tune it first)"
        )
    if new_labels is not None and not (missing or info["mismatched_keys"]):
        _name_answers(model, named, new_labels)
    if not getattr(tokenizer, "is_fast", False):
        raise ArtifactError(f"{folder}: its tokenizer cannot be saved as tokenizer.json, which serving needs")
    return model.eval(), tokenizer


def _name_answers(model: Any, named: Mapping[str, str], labels: Sequence[str]) -> None:
    """Puts the answers of a head that was kept in the labels' order; where it knows others, it starts anew."""
    import torch

    names = [named[i] for i in sorted(named, key=int)]
    if names == list(labels):
        return
    *_, last = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == len(labels))
    if sorted(names) != sorted(labels):
        last.reset_parameters()
        return
    order = [names.index(label) for label in labels]
    with torch.no_grad():
        for weight in last.parameters():
            weight.copy_(weight[order])


def _new_head(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "ignore_mismatched_sizes": True,
    }


def _save(model: Any, tokenizer: Any, draft: Path) -> None:
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    weights = draft / "model.safetensors"
    if not weights.is_file() or weights.stat().st_size >= MOST_BYTES:
        raise ArtifactError("the model is too large: hasten takes weights below 2 GiB in fp32, as one ONNX file does")


def _manifest(name: str, model: Any, tokenizer: Any) -> Manifest:
    config = model.config
    return Manifest(
        schema=SCHEMA,
        name=name,
        task="single_label_classification",
        format="torch",
        precision="fp32",
        architecture=config.model_type,
        labels=[str(config.id2label[i]) for i in range(config.num_labels)],
        max_tokens=_max_tokens(config, tokenizer),
        parameters=count_parameters(model),
        batch_invariant=True,
        step=StepRecord(name="import", parent=None, versions=library_versions(VERSIONED)),
    )


def _max_tokens(config: Any, tokenizer: Any) -> int:
    positions = int(config.max_position_embeddings)
    if config.model_type in OFFSET_POSITIONS:
        positions -= int(config.pad_token_id or 0) + 1
    limit = int(tokenizer.model_max_length)
    return min(positions, limit) if 0 < limit < UNLIMITED_TOKENS else positions
