"""What the user has, made into three splits: read, cleaned of texts that stand in two of them, cut to size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hasten.errors import DataError, UsageError
from hasten.workload import Workload, read_texts, read_workload, some_rows, split, without_overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the user has.

    Attributes:
        model: Folder or hub id of a fine-tuned classifier.
        train: Labelled training data, see `read_workload`.
        test: Labelled test data.
        valid: Labelled validation data; None splits some off the training data.
        unlabelled: Texts without labels, for the teacher to answer; None has none.
        text_column: Column of the texts; None guesses.
        label_column: Column of the labels; None guesses.
        student: Folder or hub id of a small checkpoint to start the student from; None starts from the teacher.
        command: The command line to redo the run.
    """

    model: str
    train: str
    test: str
    valid: str | None = None
    unlabelled: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    student: str | None = None
    command: str = ""


class SplitOptions(Protocol):
    """The options that decide the splits; see `hasten.pipeline.OptimizeOptions`."""

    @property
    def strict(self) -> bool:
        """Whether a text that stands in two splits is an error."""
        ...

    @property
    def valid_share(self) -> float:
        """Share of the training data to validate on."""
        ...

    @property
    def valid_rows(self) -> int:
        """Most rows to validate on."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the shuffle."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The three splits, cleaned.

    Attributes:
        train: For calibration and distillation.
        valid: For choosing.
        test: For the numbers that are reported.
        unlabelled: Texts for the teacher to answer.
        removed: Texts removed from the training or validation rows because they stand in another split.
    """

    train: Workload
    valid: Workload
    test: Workload
    unlabelled: tuple[str, ...] = ()
    removed: tuple[str, ...]


def read_data(inputs: Inputs, options: SplitOptions, labels: Sequence[str]) -> Data:
    """Reads, cleans and splits the data.

    Args:
        inputs: Where they are.
        options: Share and seed of the validation split; `strict`.
        labels: The model's label names by id.

    Returns:
        The three splits; no text of the validation or test data stands in the training data, and none of the test data
        in the validation data.

    Raises:
        DataError: Data cannot be read or leave nothing to train on, or texts overlap and `strict` is set.
        UsageError: The validation share or size is out of range.
    """
    if not 0 < options.valid_share < 1 or options.valid_rows < 2:
        raise UsageError(
            f"validation needs a share between 0 and 1 and 2 rows, not {options.valid_share}, {options.valid_rows}"
        )

    def read(source: str, name: str) -> Workload:
        return read_workload(
            source, name=name, labels=labels, text_column=inputs.text_column, label_column=inputs.label_column
        )

    test, train = read(inputs.test, "test"), read(inputs.train, "train")
    if inputs.valid is not None:
        valid, from_valid = without_overlap(read(inputs.valid, "valid"), test)
        _check_left(valid, inputs.valid)
    else:
        train, from_valid = without_overlap(train, test)
        _check_left(train, inputs.train)
        share = min(options.valid_share, options.valid_rows / len(train))
        train, valid = split(train, share=share, seed=options.seed)
    _check_read_alike(test, train, valid)
    valid = valid.take(sorted(some_rows(len(valid), options.valid_rows, seed=options.seed)))
    if len(set(valid.labels)) < 2:
        raise DataError(
            f"{valid.source}: the {len(valid):,} rows left to choose by, once those that stand in the test data are "
            "removed and --valid-rows are drawn, are of one class; give more of the others"
        )
    train, from_train = without_overlap(train, valid, test)
    removed = tuple(dict.fromkeys([*from_valid, *from_train]))
    if removed and options.strict:
        raise DataError(
            f"{len(removed):,} texts stand in two splits, such as {removed[0][:80]!r}; --strict forbids that"
        )
    _check_left(train, inputs.train)
    if len(set(train.labels)) < 2:
        raise DataError(f"{inputs.train}: one class is left once rows that stand in the other splits are removed")
    more = () if inputs.unlabelled is None else read_texts(inputs.unlabelled, text_column=inputs.text_column)
    return Data(train=train, valid=valid, test=test, unlabelled=more, removed=removed)


def _check_read_alike(*splits: Workload) -> None:
    """Refuses splits of which one seems to tell ids and another names that are numbers as well."""
    names, ids = (next((s.source for s in splits if s.told == told), None) for told in ("names", "ids"))
    if names is not None and ids is not None:
        raise DataError(
            f"the labels of {ids} can only be ids, those of {names} may be ids or names of the model's; "
            "write names in all of them"
        )


def _check_left(workload: Workload, source: str) -> None:
    if not len(workload):
        raise DataError(f"{source}: no rows are left once those that stand in the other splits are removed")
