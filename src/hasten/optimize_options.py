"""What a run is asked for, and who is told how far it has come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal, Protocol

from hasten.budget import Budget
from hasten.errors import UsageError
from hasten.onnx_export import ExportOptions
from hasten.profiling import ProfileOptions
from hasten.quantization import QuantizeOptions
from hasten.teaching import DistillOptions
from hasten.training_plan import check_minutes
from hasten.transfer import TransferOptions

Layers = Literal["spaced", "influence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizeOptions:
    """How to go down the road.

    Attributes:
        budget: What must be met.
        every_step: Go through all steps even when an early one meets the budget.
        strict: Treat a text that stands in two splits as an error instead of removing it from the training side.
        valid_share: Share of the training data to validate on, where no validation data are given.
        valid_rows: Most rows to validate on; above 0.
        valid_samples: Timed requests a variant on the validation split, at most; where the budget is a p99, as many as
            for the report instead.
        shapes: Student shapes to consider, such as `2x128,3x384`; None takes a catalogue.
        layers: Which of the teacher's layers a student starts from: evenly `spaced` ones, or those of the most
            `influence` on the training texts.
        seed: Seed of splits, orders and training.
        export: How to export.
        quantize: How to quantize; the calibration is searched for.
        max_lost_points: Points of accuracy that a variant of lower precision may lose against the same model in fp32.
            If INT8 is shown to lose more, products are put back to fp32; what still does is chosen last.
        simple: Whether models without layers stand for choice too, before any student.
        openvino: Whether OpenVINO's variants stand for choice too; None takes them where the extra is installed.
        distill: How to distil.
        transfer: How to widen the training texts for the teacher to answer.
        minutes: Minutes to spend on teaching the student; passes and new texts are then planned from speeds measured
            here, in place of `distill.train.epochs` and `transfer.augment`. None leaves it to those two.
        seeds: Students to train alike but for the seed, at least 1; the report gives the spread.
        profile: How to measure.
    """

    budget: Budget
    every_step: bool = False
    strict: bool = False
    valid_share: float = 0.2
    valid_rows: int = 1000
    valid_samples: int = 500
    shapes: str | None = None
    layers: Layers = "spaced"
    seed: int = 0
    export: ExportOptions = field(default_factory=ExportOptions)
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    max_lost_points: float = 0.3
    simple: bool = True
    openvino: bool | None = None
    distill: DistillOptions = field(default_factory=DistillOptions)
    transfer: TransferOptions = field(default_factory=TransferOptions)
    minutes: float | None = None
    seeds: int = 1
    profile: ProfileOptions = field(default_factory=ProfileOptions)

    def __post_init__(self) -> None:
        """Checks the minutes, the seeds and the points.

        Raises:
            UsageError: They are out of range, or there is guidance too, which no plan counts.
        """
        if math.isnan(self.max_lost_points):
            raise UsageError("--max-lost-points must be a number of points, not nan")
        check_minutes(self.minutes, guided=self.distill.guide.epochs > 0)
        if self.seeds < 1:
            raise UsageError(f"--seeds must be at least 1, not {self.seeds}")

    @property
    def with_openvino(self) -> bool:
        """Whether OpenVINO's variants are made."""
        return all(map(find_spec, ("openvino", "nncf"))) if self.openvino is None else self.openvino


class Observer(Protocol):
    """Is told how far a run has come."""

    def stage(self, name: str) -> None:
        """A new stage begins."""
        ...

    def advance(self, done: int, total: int) -> None:
        """The current stage has come so far."""
        ...


class Silent:
    """An observer that says nothing."""

    def stage(self, name: str) -> None:
        """Ignores it."""

    def advance(self, done: int, total: int) -> None:
        """Ignores it."""
