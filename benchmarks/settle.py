"""What a variant's tail latency owes to the threads of the variants measured beside it, by the pause between blocks.

    python benchmarks/settle.py VARIANT_FOLDER NEIGHBOUR_FOLDER... --texts FILE

The first variant is measured alone, then in turn with the neighbours at several pauses. Nothing else may run.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from time import sleep
from typing import Annotated

import numpy as np
import typer

from hasten.profiling import ProfileOptions, Worker
from hasten.variant import open_variant
from hasten.workload import read_texts
from provenance import save_result

PAUSES_S = (0.0, 0.005, 0.02, 0.05, 0.1, 0.3)
REQUESTS = 500


def percentiles(folders: list[Path], texts: tuple[str, ...], pause_s: float) -> dict[str, float]:
    """Percentiles of the first variant's latency, in ms, with all taking turns."""
    options = ProfileOptions()
    samples: list[float] = []
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(open_variant(f), options.resolved_threads)) for f in folders]
        for start in range(0, REQUESTS, options.block):
            for number, worker in enumerate(workers):
                sleep(pause_s)
                reply = worker.classify(texts[start : start + options.block], warmup=options.warmup)
                samples += reply.samples_ms if number == 0 else []
    return {f"p{q}_ms": round(float(np.percentile(samples, q)), 3) for q in (50, 90, 95, 99)}


def main(variant: Path, neighbours: list[Path], texts: Annotated[str, typer.Option()]) -> None:
    """Measures, prints and saves."""
    lines = read_texts(texts)[:REQUESTS]
    rows = [{"beside": 0, "pause_s": 0.0} | percentiles([variant], lines, 0.0)]
    for pause_s in PAUSES_S:
        rows.append(
            {"beside": len(neighbours), "pause_s": pause_s} | percentiles([variant, *neighbours], lines, pause_s)
        )
        print(rows[-1], flush=True)
    save_result("settle", {"variant": variant.name, "neighbours": [n.name for n in neighbours], "rows": rows})


if __name__ == "__main__":
    typer.run(main)
