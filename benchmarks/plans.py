"""How often a student should go through its texts before minutes go into new ones: plans of the same minutes, compared.

    python benchmarks/passes.py TASK TEACHER_OUT OUT [--minutes 3] [--texts 14000] [--shape 5x384]
        [--learning-rate 3e-4] [--wanted 1.65,4,8]

TASK is `sst2-mpnet` or `clinc150-mpnet`; TEACHER_OUT is the folder that `teachers.py` made of it. Each student is
planned as `--minutes` plans, but for the passes that it wants first, and judged on the validation split alone. What
was made before is not made again. Results go to `results/passes.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from hasten.progress import Bars
from hasten.workshop import Workshop
from ingredients import Arm, Study, figures
from provenance import save_result


def main(
    task: str, teacher: Path, out: Path, minutes: float = 3.0, texts: int = 14_000, shape: str = "5x384",
    learning_rate: float = 3e-4, wanted: str = "1.65,4,8",
) -> None:  # fmt: skip
    """Trains and judges the students, and saves what they reach."""
    shop, rows = Workshop(out), list[dict[str, Any]]()
    with shop.held(), Bars() as bars:
        study = Study(teacher, shop, minutes, bars, texts=texts, shape=shape, task=task, learning_rate=learning_rate)
        base = study.right(study.teacher, study.valid)
        for passes in map(float, wanted.split(",")):
            student, spent = study.trained(Arm(name=f"w{passes:.1f}", epochs=passes), 0)
            served = study.in_int8(student, student.name)
            rows.append({"wanted": passes, **spent, "valid": figures(study.right(served, study.valid), base)})
            print(rows[-1])
    save_result("passes", {
        "task": task, "shape": shape, "minutes": minutes, "texts": texts, "learning_rate": learning_rate,
        "precision": study.base.train.precision, "teacher": figures(base, base)["accuracy"],
        "texts_per_s": {"answers": 1 / study.speeds.answer_s, "training": 1 / study.speeds.train_s}, "rows": rows,
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
