"""What is asked of a model: texts and labels, read from a file or a hub, checked against the model, split.

Three splits with three uses: *train* for calibration and distillation, *valid* for choosing, *test* for the numbers
that are reported, once. Texts that stand in two of them are removed from the training side (`without_overlap`).
"""

from __future__ import annotations

import csv
import glob
import hashlib
import math
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hasten.errors import DataError, MissingExtraError

SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
TEXT_COLUMNS = ("text", "sentence", "content", "review", "query", "utterance", "inputs", "input")
LABEL_COLUMNS = ("label", "labels", "intent", "class", "category", "topic", "sentiment", "target")
PLACEHOLDER = re.compile(r"LABEL_\d+")  # transformers' name of a label that was given none
SHOWN = 5
INDEX = "__index_level_"
Told = Literal["names", "ids", "either"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Labelled texts of one split.

    Attributes:
        name: The split: `train`, `valid` or `test`.
        source: Where they were read from.
        texts: The texts; shape [rows].
        labels: Label id of each text; shape [rows].
        told: Whether the column of labels was taken to hold names or ids; `either` where both say the same.
    """

    name: str
    source: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    told: Told = "either"

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.texts)

    @property
    def digest(self) -> str:
        """sha256 (hex) over texts and labels."""
        hasher = hashlib.sha256()
        for text, label in zip(self.texts, self.labels, strict=True):
            hasher.update(f"{label}\t{len(text)}\t{text}\n".encode("utf-8", "surrogatepass"))
        return hasher.hexdigest()

    def take(self, rows: Sequence[int]) -> Workload:
        """The rows at these indices."""
        return replace(self, texts=tuple(self.texts[r] for r in rows), labels=tuple(self.labels[r] for r in rows))


def read_workload(
    source: str, *, name: str, labels: Sequence[str], text_column: str | None = None, label_column: str | None = None
) -> Workload:
    """Reads labelled texts.

    Args:
        source: A CSV, TSV, JSON-lines or Parquet file, or a data set of a hub or a local folder of files as
            `ID[:CONFIG][@SPLIT]`; the split is `name`'s (`validation` for `valid`) unless given.
        name: The split it is for: `train`, `valid` or `test`.
        labels: The model's label names by id; the column holds names, or else ids.
        text_column: Column of the texts; guessed when one of the usual names or types is the only candidate.
        label_column: Column of the labels; guessed likewise.

    Returns:
        The rows, in order.

    Raises:
        DataError: The source cannot be read, lacks a column, is empty, has an empty text or a label unknown to
            the model, or all its rows have one label.
        MissingExtraError: `datasets` is not installed.
    """
    table = _read_table(source, name)
    text_column = _column(source, table, text_column, TEXT_COLUMNS, "--text-column")
    label_column = _column(source, table, label_column, LABEL_COLUMNS, "--label-column")
    texts = _texts(source, table, text_column)
    ids, told = _label_ids(source, _label_values(table, label_column, labels), label_column, labels)
    if len(set(ids)) < 2:
        raise DataError(
            f"{source}: all {len(ids):,} rows have the label {labels[ids[0]]!r}; at least two classes are needed"
        )
    return Workload(name=name, source=source, texts=texts, labels=tuple(ids), told=told)


def read_texts(source: str, *, name: str = "train", text_column: str | None = None) -> tuple[str, ...]:
    """Reads texts and leaves labels, if there are any, aside.

    Args:
        source: As in `read_workload`.
        name: The split it is for, as in `read_workload`.
        text_column: As in `read_workload`.

    Returns:
        The texts, in order; at least one.

    Raises:
        DataError: The source cannot be read, lacks the column, is empty, or has an empty text.
        MissingExtraError: `datasets` is not installed.
    """
    table = _read_table(source, name)
    return _texts(source, table, _column(source, table, text_column, TEXT_COLUMNS, "--text-column"))


def _read_table(source: str, name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "optimize") from error
    datasets.disable_progress_bars()
    path = Path(source)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind and not path.is_file():
        raise DataError(f"{source}: no such file")
    if path.is_file() and kind is None:
        raise DataError(f"{source}: not a kind of file hasten reads; it reads {', '.join(SUFFIXES)}")
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{source}: the file is empty")
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = _read_file(datasets, path, kind, cache) if kind else _read_hub(datasets, source, name, cache)
        except Exception as error:  # datasets, pandas and pyarrow raise many kinds
            if "corresponds to no data" in str(error):
                raise DataError(f"{source}: no rows") from error
            cause = error.__cause__ or error
            raise DataError(
                f"{source}: cannot be read: {str(cause).splitlines()[0] if str(cause) else cause!r}"
            ) from error
    if not len(table):
        raise DataError(f"{source}: no rows")
    return table


def _read_file(datasets: Any, path: Path, kind: str, cache: str) -> Any:
    import pandas

    options: dict[str, Any] = {
        "data_files": glob.escape(str(path)),
        "split": "train",
        "cache_dir": cache,
        "keep_in_memory": True,
    }
    if kind == "csv":
        form: dict[str, Any] = {"keep_default_na": False, "encoding": "utf-8"}
        form |= {"sep": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
        columns = pandas.read_csv(path, nrows=0, **form).columns
        options |= form | {
            "converters": dict.fromkeys(columns, str)
        }  # else each part of a large file has its own types
    table = datasets.load_dataset(kind, **options)
    if kind == "csv" and any(column.startswith(INDEX) for column in table.column_names):  # what is too much, for pandas
        raise ValueError("rows have more fields than the header has columns; put texts with separators in quotes")
    return table


def _read_hub(datasets: Any, source: str, name: str, cache: str) -> Any:
    where, _, chosen = source.partition("@")
    where, _, config = where.partition(":")
    part = chosen or {"valid": "validation"}.get(name, name)
    form = datasets.load_dataset_builder(where, config or None, cache_dir=cache).config
    options = {"keep_default_na": False} if hasattr(form, "keep_default_na") else {}  # "NA" is a text, not its absence
    return datasets.load_dataset(where, config or None, split=part, cache_dir=cache, keep_in_memory=True, **options)


def _column(source: str, table: Any, chosen: str | None, usual: Sequence[str], option: str) -> str:
    names: list[str] = table.column_names
    if chosen is not None:
        if chosen not in names:
            raise DataError(f"{source}: no column {chosen!r}; it has {', '.join(map(repr, names))}")
        return chosen
    found = [column for column in names if column.lower() in usual]
    if len(found) != 1:
        what = "no column" if not found else f"{len(found)} columns"
        raise DataError(f"{source}: {what} that {option} could mean; name one of {', '.join(map(repr, names))}")
    return found[0]


def _texts(source: str, table: Any, column: str) -> tuple[str, ...]:
    values: list[Any] = table[column][:]
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise DataError(f"{source}: row {row}: column {column!r} holds {value!r}, not a text; name --text-column")
        if not value.strip():
            raise DataError(f"{source}: row {row}: the text is empty; remove the row")
    return tuple(values)


def _label_values(table: Any, column: str, labels: Sequence[str]) -> list[Any]:
    """The column, with the data set's names for its ids unless the model has no names for them."""
    feature = table.features[column]
    values: list[Any] = table[column][:]
    names: list[str] = getattr(feature, "names", None) or []
    if len(names) == len(labels) and all(map(PLACEHOLDER.fullmatch, labels)):
        return values
    return [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in values]


def _label_ids(source: str, values: list[Any], column: str, labels: Sequence[str]) -> tuple[list[int], Told]:
    by_name = {label.strip(): i for i, label in enumerate(labels)}
    folded = {label.casefold(): i for label, i in by_name.items()}
    by_id = {str(i): i for i in range(len(labels))}
    any_case = folded if len(folded) == len(labels) else {}
    keys = ["" if value is None else str(value).strip() for value in values]
    whole = [key.removesuffix(".0") for key in keys]  # of numbers beside which a label is missing elsewhere
    named = [
        by_name.get(key, by_name.get(number, any_case.get(key.casefold())))
        for key, number in zip(keys, whole, strict=True)
    ]
    numbered = [by_id.get(number) for number in whole]
    ids = named if named.count(None) <= numbered.count(None) else numbered  # a column holds one kind
    unknown = Counter(key for key, label in zip(keys, ids, strict=True) if label is None)
    if unknown:
        shown = ", ".join(f"{key!r} ({n:,} rows)" for key, n in unknown.most_common(SHOWN))
        raise DataError(
            f"{source}: column {column!r} has labels that the model does not know: {shown}; "
            f"the model's labels are {', '.join(map(repr, labels[:20]))}{' …' if len(labels) > 20 else ''}"
        )
    told: Told = "either" if named == numbered else "names" if ids is named else "ids"
    return [label for label in ids if label is not None], told


def split(workload: Workload, *, share: float, seed: int) -> tuple[Workload, Workload]:
    """Splits a validation part off the training data, stratified by label; rows of one text stay together.

    Args:
        workload: The training data.
        share: Share of the texts to split off, above 0 and below 1; at least as many as there are classes.
        seed: Seed of the shuffle.

    Returns:
        The remaining training part and the validation part.

    Raises:
        DataError: A class has a single text, or the data are too few for the classes.
    """
    import datasets

    alike: dict[str, list[int]] = {}
    for row, text in enumerate(workload.texts):
        alike.setdefault(normalised(text), []).append(row)
    groups = list(alike.values())
    labels = [workload.labels[rows[0]] for rows in groups]
    counts = Counter(labels)
    if lonely := sorted(label for label, n in counts.items() if n < 2):
        raise DataError(
            f"{workload.source}: label id {lonely[0]} has one text; give --valid, or at least 2 texts a class"
        )
    names = [str(i) for i in range(max(counts) + 1)]
    table = datasets.Dataset.from_dict({"group": list(range(len(groups))), "label": labels})
    table = table.cast_column("label", datasets.ClassLabel(names=names))
    size = max(math.ceil(share * len(groups)), len(counts))
    try:
        parts = table.train_test_split(test_size=size, stratify_by_column="label", seed=seed)
    except ValueError as error:
        raise DataError(f"{workload.source}: cannot split {len(groups):,} texts for validation: {error}") from error
    rest, held = (
        workload.take(sorted(row for group in parts[part]["group"] for row in groups[group]))
        for part in ("train", "test")
    )
    return rest, replace(held, name="valid")


def without_overlap(train: Workload, *others: Workload) -> tuple[Workload, list[str]]:
    """Removes from a split the texts that stand in others.

    Args:
        train: The split to clean.
        *others: The splits that stay as they are.

    Returns:
        The cleaned split and the removed texts (each once, in order).
    """
    taken = {normalised(text) for other in others for text in other.texts}
    keep = [row for row, text in enumerate(train.texts) if normalised(text) not in taken]
    removed = dict.fromkeys(text for text in train.texts if normalised(text) in taken)
    return train.take(keep), list(removed)


def normalised(text: str) -> str:
    """What makes two texts the same: their characters in one composition (NFKC), without case and spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def some_rows(rows: int, most: int, *, seed: int) -> list[int]:
    """A few rows that stand for all, none twice.

    Args:
        rows: Number of rows to draw from, at least 1.
        most: How many indices, at most.
        seed: Seed of the draw.

    Returns:
        Indices; shape [min(rows, most)].
    """
    return random_rows(rows, min(rows, most), seed=seed)


def random_rows(rows: int, size: int, *, seed: int) -> list[int]:
    """Row indices in random order, so that lengths are distributed as the workload's.

    Args:
        rows: Number of rows to draw from, at least 1.
        size: How many indices; the rows are gone through again, reshuffled, when there are fewer.
        seed: Seed of the shuffle.

    Returns:
        Indices; shape [size].
    """
    generator = np.random.default_rng(seed)
    passes = max(1, -(-size // rows))
    return np.concatenate([generator.permutation(rows) for _ in range(passes)])[:size].tolist()
