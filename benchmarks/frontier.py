"""Accuracy against latency: students of many shapes and the one without layers, of one teacher.

    python benchmarks/frontier.py TEACHER_OUT OUT [--minutes 10] [--texts 20000] [--shapes 6x384,...] [--name frontier]

TEACHER_OUT is what `teachers.py sst2-mpnet` made. Every student starts from the packaged 6x384 encoder, cut to its
shape, and has the same minutes, planned as `hasten distill --minutes` plans them: new texts, the teacher's answers,
passes. It is measured in static INT8; the one without layers has the first shape's new texts, its own number of passes,
and stays in fp32. The baseline is the teacher in eager PyTorch; all are measured in one interleaved
run on the test data, which are read once and choose nothing. Interrupted and started again, it goes on.

Drawn in are points that others published, as ratios to their own baselines, on their own machines: a share of accuracy
and a speed-up do not compare exactly across teachers and clocks, so they are a map, not a race.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.figure import Figure

from hasten.measurement import Measurement, speedup
from hasten.profiling import ProfileOptions, profile
from hasten.progress import Bars
from hasten.static_student import StaticOptions, train_static
from hasten.teaching import Lesson
from hasten.training_plan import plan_training, wanted_epochs
from hasten.variant import Variant
from hasten.workshop import Workshop
from ingredients import BATCH, LEARNING_RATE, TASK, Arm, Study
from provenance import HERE, save_result

SHAPES = "6x384,4x384,3x384,2x384,3x256,2x128"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What others published.

    Attributes:
        name: As it is drawn.
        speedup: Over their baseline.
        retained: Share of their baseline's accuracy on SST-2.
        source: Where it says so.
    """

    name: str
    speedup: float
    retained: float
    source: str


TINYBERT = "Jiao et al. 2020, TinyBERT, table 1: SST-2 test, BERT-base 93.4, speed-ups on a GPU"
PUBLISHED = (
    Point(name="write-up", speedup=13.2, retained=0.98, source="198 to 15 ms on a CPU, a student of 4 layers"),
    Point(name="TinyBERT-6", speedup=2.0, retained=93.1 / 93.4, source=TINYBERT),
    Point(name="TinyBERT-4", speedup=9.4, retained=92.6 / 93.4, source=TINYBERT),
    Point(name="DistilBERT-4", speedup=3.0, retained=91.4 / 93.4, source=TINYBERT),
)


def new_texts(study: Study, minutes: float) -> tuple[str, ...]:
    """Those of a study's plan."""
    rows = len(study.train)
    wanted = wanted_epochs(rows, len(study.torch.labels))
    return study.transfer(plan_training(minutes, study.speeds, labelled=rows, wanted=wanted))


def static(study: Study, transfer: tuple[str, ...]) -> Variant:
    """The student without layers, on the same texts."""
    options = StaticOptions()
    options = replace(options, train=replace(options.train, threads=study.threads))
    lesson = Lesson(data=study.train, transfer=transfer, teacher=study.teacher)
    return study.variant(
        "static",
        lambda out: train_static(
            study.torch, out, options, name="static", lesson=lesson, distillation=study.base, work=study.shop.work,
            progress=study.bars.advance,
        ),
        study.torch.digest, lesson.identity, options, study.base,
    )  # fmt: skip


def row_of(baseline: Measurement, measured: Measurement, spent: dict[str, float]) -> dict[str, Any]:
    """One variant in figures."""
    return {
        "variant": measured.variant, "parameters": measured.parameters.total, **spent,
        "p50_ms": round(measured.latency.percentile(50).value, 3), "speedup": asdict(speedup(baseline, measured)),
        "accuracy": asdict(measured.quality.accuracy()),
        "retained": asdict(measured.quality.retention(baseline.quality)),
    }  # fmt: skip


def main(
    teacher: Path, out: Path,
    minutes: Annotated[float, typer.Option(help="For each student, its teacher's answers included.")] = 10.0,
    texts: Annotated[int, typer.Option(help="Of the training texts, at random.")] = 20_000,
    shapes: Annotated[str, typer.Option(help="Of the students, separated by commas.")] = SHAPES,
    name: str = "frontier",
) -> None:  # fmt: skip
    """Trains all students, measures them, saves, draws."""
    shop, made, spent = Workshop(out), list[Variant](), dict[str, dict[str, float]]()
    first: Study | None = None
    with shop.held(), Bars() as bars:
        for shape in shapes.split(","):
            study = Study(teacher, shop, minutes, bars, shape=shape, texts=texts)
            first = first or study
            arm = Arm(name="answers, more texts", epochs=wanted_epochs(texts, len(study.torch.labels)))
            student, how = study.trained(arm, 0)
            made.append(study.in_int8(student, shape))
            spent[made[-1].name] = how
        if first is None:
            raise typer.BadParameter("no shapes")
        bars.stage("distilling static")
        made.append(static(first, new_texts(first, minutes)))
        bars.stage("measuring")
        baseline, *others = profile(
            [first.torch, first.teacher, *made], first.test, ProfileOptions(threads=first.threads), scenario=name,
            progress=bars.advance,
        )  # fmt: skip
    rows = [row_of(baseline, other, spent.get(other.variant, {})) for other in (baseline, *others)]
    save_result(name, {
        "task": TASK, "minutes": minutes, "texts": texts, "learning_rate": LEARNING_RATE, "batch": BATCH,
        "threads": first.threads, "rows": rows,
        "published": [asdict(point) for point in PUBLISHED],
    })  # fmt: skip
    (HERE / "results" / f"{name}.md").write_text(table(rows), encoding="utf-8")
    (HERE.parent / "docs" / "images" / f"{name}.svg").write_text(picture(rows, minutes), encoding="utf-8")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The figures."""
    lines = ["| | parameters | passes | texts | p50 (ms) | speed-up | accuracy (%) | retained (%) |"]
    lines += ["| :--- |" + " ---: |" * 7]
    for row in rows:
        kept = row["retained"]
        lines.append(
            f"| {row['variant']} | {row['parameters'] / 1e6:.1f} M | {row.get('passes', '')} | "
            f"{row.get('texts', '')} | {row['p50_ms']:.2f} | {row['speedup']['value']:.1f}× | "
            f"{100 * row['accuracy']['value']:.1f} | "
            f"{100 * kept['value']:.1f} ({100 * kept['lower']:.1f}–{100 * kept['upper']:.1f}) |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]], minutes: float) -> str:
    """The frontier as SVG: share of the accuracy kept against the speed-up, the intervals as bars."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "frontier", "font.size": 9}):
        figure = Figure(figsize=(9, 5.4), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows[1:]):
            kept, at = row["retained"], row["speedup"]["value"]
            below, above = kept["value"] - kept["lower"], kept["upper"] - kept["value"]
            axes.errorbar(at, 100 * kept["value"], [[100 * below], [100 * above]], fmt="o", color="#2563eb", capsize=2)
            end, offset = ("upper", 4) if place % 2 else ("lower", -11)  # in turn, for neighbours are near
            axes.annotate(row["variant"].removesuffix("-int8"), (at, 100 * kept[end]), (0, offset), ha="center",
                          textcoords="offset points", color="#1e3a8a")  # fmt: skip
        for point in PUBLISHED:
            axes.plot(point.speedup, 100 * point.retained, "D", color="#9ca3af")
            axes.annotate(point.name, (point.speedup, 100 * point.retained), (5, -11), textcoords="offset points",
                          color="#6b7280")  # fmt: skip
        axes.set_xscale("log")
        axes.margins(x=0.1)
        axes.xaxis.set_major_formatter("{x:g}×")
        axes.set_title(f"SST-2: teacher in INT8, students of {minutes:g} minutes (blue, 95 % intervals); others (grey)")
        axes.set_xlabel("speed-up of the median latency over eager PyTorch")
        axes.set_ylabel("share of the teacher's accuracy kept (%)")
        axes.grid(visible=True, which="both", alpha=0.2)
        stream = StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


if __name__ == "__main__":
    typer.run(main)
