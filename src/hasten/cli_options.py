"""Options that several verbs share, and the dataclasses whose defaults they show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.budget import Budget
from hasten.distillation import DistillOptions
from hasten.optimize_options import OptimizeOptions
from hasten.profiling import ProfileOptions
from hasten.quantization import QuantizeOptions
from hasten.serve_options import ServeOptions
from hasten.torch_training import TrainOptions

SERVE = ServeOptions()
OPTIMIZE, PROFILE, QUANTIZE, DISTILL, TRAIN = (
    OptimizeOptions(budget=Budget(speedup=1.0)), ProfileOptions(), QuantizeOptions(), DistillOptions(), TrainOptions(),
)  # fmt: skip

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
Folder = Annotated[Path, typer.Argument(help="A variant folder, such as OUT/chosen.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the texts; guessed when unambiguous.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the labels, by name or id; guessed when unambiguous.")]
Threads = Annotated[int | None, typer.Option(help="Threads for one inference; all cores at hand if not given.")]
Samples = Annotated[int, typer.Option(help="Timed requests a variant, at least; 299 are needed to judge a p99.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report's JSON to stdout.")]
Epochs = Annotated[int, typer.Option(help="Passes over the training texts.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate.")]
Name = Annotated[str | None, typer.Option(help="Name of the new variant; the folder's name if not given.")]
