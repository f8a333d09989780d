"""Does a trained student take as long as the row of its shape, measured before any training, said it would?

    python benchmarks/shape_rows.py NAME RUN VALID TEST [--launches 8] [--samples 500]

RUN is the folder of a run of `optimize` that trained students; VALID and TEST are its data files. Its INT8 students are
timed beside an untrained one of their shape, made as the table of shapes makes them: random weights, quantized on one
text. All are in one interleaved run, since a machine's speed changes from hour to hour, and the run is launched several
times, since one graph in two processes differs by more than its requests do: the untrained one stands in it twice to
show by how much. All are asked for texts of the validation split, as for the table, and for texts of the test split, as
for the report. Results go to `results/shape_rows_<name>.json`. Nothing else may run beside it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.errors import HastenError
from hasten.profiling import ProfileOptions, time_only
from hasten.student_search import untrained
from hasten.students import shape_of
from hasten.variant import Variant, open_variant
from hasten.workload import random_rows, read_texts
from peers.measuring import times_faster
from provenance import save_result

ROW, AGAIN = "row", "row again"
SPLITS = ("valid", "test")


def main(
    name: str,
    run: Path,
    valid: str,
    test: str,
    launches: Annotated[int, typer.Option(help="How often all processes are started.")] = 8,
    samples: Annotated[int, typer.Option(help="Requests of each split, variant and launch.")] = 500,
) -> None:
    """Times the students of one run and saves their ratios to their row."""
    try:
        result = compared(run / "variants", drawn(valid, samples), drawn(test, samples), launches)
    except HastenError as error:
        sys.exit(str(error))
    save_result(f"shape_rows_{name}", {"launches": launches, "samples": samples, **result})


def compared(variants: Path, valid: list[str], test: list[str], launches: int) -> dict[str, Any]:
    """Latencies of all INT8 students of a run, and their ratios to their row.

    Args:
        variants: The run's folder of variants; its students must be of one shape.
        valid: Texts that the row is measured on.
        test: Texts that the report is measured on.
        launches: How often all are started.

    Returns:
        The shape, and a row a model and split; above 1 it takes longer than the untrained one on `valid`.
    """
    students = [open_variant(path) for path in sorted(variants.glob("student-*-int8"))]
    if len({str(shape_of(student)) for student in students}) != 1:
        sys.exit(f"{variants}: {len(students)} INT8 students; this needs some, all of one shape")
    shape, source = shape_of(students[0]), open_variant(variants / students[0].name.replace("int8", "torch"))
    with tempfile.TemporaryDirectory() as folder:
        models = dict.fromkeys((ROW, AGAIN), untrained(source, shape, Path(folder), valid))
        models |= {student.name: student for student in students}
        found = taken(models, dict(zip(SPLITS, (valid, test), strict=True)), launches)
    ratios = times_faster(f"{ROW}, {SPLITS[0]}", list(found), found)
    table = [
        {"model": model, "split": split, "smoothing": models[model].manifest.step.options["smoothing"]}
        | {"p50_ms": median_of_launches(found[f"{model}, {split}"]), "to_row": ratios[f"{model}, {split}"]}
        for model in models for split in SPLITS
    ]  # fmt: skip
    for line in table:
        print(line, flush=True)
    return {"shape": str(shape), "rows": table}


def taken(models: dict[str, Variant], texts: dict[str, list[str]], launches: int) -> dict[str, list[list[float]]]:
    """Milliseconds by model and split, launch by launch; texts of the splits take turns."""
    found: dict[str, list[list[float]]] = {f"{model}, {split}": [] for model in models for split in texts}
    for launch in range(launches):
        in_turn = [text for both in zip(*texts.values(), strict=True) for text in both]
        latencies = time_only(list(models.values()), in_turn, ProfileOptions(seed=launch))
        for model, latency in zip(models, latencies, strict=True):
            for place, split in enumerate(texts):
                found[f"{model}, {split}"].append(list(latency.samples_ms[place :: len(texts)]))
        print(f"launch {launch + 1} of {launches}", flush=True)
    return found


def median_of_launches(samples: list[list[float]]) -> float:
    """The middle one of the launches' medians (ms)."""
    return round(statistics.median(statistics.median(launch) for launch in samples), 4)


def drawn(source: str, samples: int) -> list[str]:
    """Texts of a file, in random order."""
    texts = read_texts(source)
    return [texts[row] for row in random_rows(len(texts), samples, seed=0)]


if __name__ == "__main__":
    typer.run(main)
