"""What a plan of minutes brings: passes that come before new texts, and minutes, compared on the validation split.

    python benchmarks/plans.py TASK TEACHER_OUT OUT [--minutes 3] [--wanted 4] [--texts 14000] [--shape 5x384]
        [--learning-rate 3e-4]

TASK is `sst2-mpnet` or `clinc150-mpnet`; TEACHER_OUT is the folder that `teachers.py` made of it. There is a student
for each of the minutes and each number of wanted passes, planned as `--minutes` plans; the test split is not looked at.
What was made before is not made again. Results go to `results/plans_<task>.json`.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import typer

from hasten.progress import Bars
from hasten.workshop import Workshop
from ingredients import Arm, Study, figures
from provenance import save_result


def main(
    task: str, teacher: Path, out: Path, minutes: str = "3", wanted: str = "4", texts: int = 14_000,
    shape: str = "5x384", learning_rate: float = 3e-4,
) -> None:  # fmt: skip
    """Trains and judges the students, and saves what they reach."""
    shop, rows = Workshop(out), list[dict[str, Any]]()
    first, *_ = several = numbers(minutes)
    with shop.held(), Bars() as bars:
        study = Study(teacher, shop, first, bars, texts=texts, shape=shape, task=task, learning_rate=learning_rate)
        base = study.right(study.teacher, study.valid)
        for spent, passes in product(several, numbers(wanted)):
            longer = "" if spent == first else f"x{spent / first:g}"
            student, plan = study.trained(Arm(name=f"w{passes:.1f}{longer}", epochs=passes, times=spent / first), 0)
            right = study.right(study.in_int8(student, student.name), study.valid)
            rows.append({"minutes": spent, "wanted": passes, **plan, "valid": figures(right, base)})
            print(rows[-1])
    save_result(f"plans_{task.replace('-', '_')}", {
        "task": task, "shape": shape, "texts": texts, "learning_rate": learning_rate,
        "precision": study.base.train.precision, "teacher": figures(base, base)["accuracy"],
        "texts_per_s": {"answers": 1 / study.speeds.answer_s, "training": 1 / study.speeds.train_s}, "rows": rows,
    })  # fmt: skip


def numbers(listed: str) -> list[float]:
    """Numbers with commas between them."""
    return [float(number) for number in listed.split(",")]


if __name__ == "__main__":
    typer.run(main)
