"""Options that several verbs share, and the dataclasses whose defaults they show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from hasten.budget import Budget
from hasten.errors import UsageError
from hasten.guidance import GuideOptions
from hasten.load import LoadOptions
from hasten.mixed_precision import Precision, native_precision
from hasten.optimize_options import OptimizeOptions
from hasten.profiling import ProfileOptions
from hasten.quantization import QuantizeOptions
from hasten.serve_options import ServeOptions
from hasten.teaching import DistillOptions
from hasten.torch_training import TrainOptions, device
from hasten.transfer import TransferOptions
from hasten.variant import PLAIN_NAME

SERVE, GUIDE, TRANSFER, LOAD = ServeOptions(), GuideOptions(), TransferOptions(), LoadOptions()
OPTIMIZE, PROFILE, QUANTIZE, DISTILL, TRAIN = (
    OptimizeOptions(budget=Budget(speedup=1.0)), ProfileOptions(), QuantizeOptions(), DistillOptions(), TrainOptions(),
)  # fmt: skip

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
Folder = Annotated[Path, typer.Argument(help="A variant folder, such as OUT/chosen.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the texts; guessed when unambiguous.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the labels, by name or id; guessed when unambiguous.")]
Threads = Annotated[int | None, typer.Option(help="Threads for one inference; all cores at hand if not given.")]
Samples = Annotated[int, typer.Option(help="Timed requests a variant, at least; 299 are needed to judge a p99.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report's JSON to stdout.")]
Epochs = Annotated[float, typer.Option(help="Passes over the training texts.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate.")]
Products = Annotated[
    str | None,
    typer.Option("--precision", help="Products in training: 'fp32' or 'bf16'; what the hardware favours if not given."),
]
Unlabelled = Annotated[str | None, typer.Option(help="Texts without labels, for the teacher to answer.")]
Augment = Annotated[
    float, typer.Option("--augment", help="New texts made from each training text, for the teacher to answer.")
]
GuideEpochs = Annotated[
    float, typer.Option(help="Passes in which the student first looks inside its teacher; 0 learns from answers alone.")
]
Minutes = Annotated[
    float | None, typer.Option(help="Minutes to teach the student; plans passes and new texts, in place of --epochs.")
]
Objective = Annotated[str, typer.Option(help="How answers are matched: 'kl', softened, or 'mse', of logits.")]
Shapes = Annotated[str | None, typer.Option(help="Student shapes to consider, such as 2x128,3x384,3x384f768.")]
Layers = Annotated[
    str, typer.Option(help="The teacher's layers to start from: evenly 'spaced', or those of most 'influence'.")
]
Seeds = Annotated[int, typer.Option(help="Students to train alike but for the seed; the report gives the spread.")]
Force = Annotated[bool, typer.Option("--force", help="Go on even if always answering one label beats the model.")]
Student = Annotated[str | None, typer.Option(help="Small checkpoint that the student starts from.")]
P99Ms = Annotated[float | None, typer.Option(help="Highest p99 latency of a request, in milliseconds.")]
Speedup = Annotated[float | None, typer.Option(help="Lowest speed-up of the median latency.")]


def _plain_name(name: str | None) -> str | None:
    if name is not None and not PLAIN_NAME.fullmatch(name):
        raise UsageError(f"--name names files, so it has no slash and does not begin with a dot: not {name!r}")
    return name


def name_of(out: Path, name: str | None) -> str:
    """The name of a new variant.

    Args:
        out: Its folder.
        name: What `--name` says, if anything.

    Returns:
        The given name, or else the folder's.

    Raises:
        UsageError: The folder's name cannot be a variant's.
    """
    if name is None and not PLAIN_NAME.fullmatch(out.resolve().name):
        raise UsageError(f"{out}: a variant's name does not begin with a dot; give it another with --name")
    return name or out.resolve().name


Name = Annotated[
    str | None,
    typer.Option(help="Name of the new variant; the folder's name if not given.", callback=_plain_name),
]


def one_of(option: str, text: str, choices: tuple[Any, ...]) -> Any:
    """A value of an option that has few.

    Args:
        option: Its name.
        text: What was given.
        choices: What may be given.

    Returns:
        The value.

    Raises:
        UsageError: It is none of them.
    """
    if text not in choices:
        raise UsageError(f"{option} is {' or '.join(map(repr, choices))}, not {text!r}")
    return text


def precision_of(text: str | None) -> Precision:
    """The number format that `--precision` asks for.

    Args:
        text: What was given, if anything.

    Returns:
        The format; the one that training is fastest in here where none was given.

    Raises:
        UsageError: It is none.
        MissingExtraError: torch is not installed.
    """
    return native_precision(device()) if text is None else one_of("--precision", text, get_args(Precision))
