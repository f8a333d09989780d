"""The three splits: free of overlap, cleaned on the training side, capped."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import write_csv
from hasten.budget import Budget
from hasten.errors import DataError
from hasten.pipeline import Inputs, OptimizeOptions, read_data
from hasten.workload import normalised

LABELS = ("Bad", "Good", "Mixed")


def read_all(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]], **options: Any) -> Any:
    valid = options.pop("valid", None)
    inputs = Inputs(
        model="", train=write_csv(folder / "train.csv", train), test=write_csv(folder / "test.csv", test),
        valid=write_csv(folder / "valid.csv", valid) if valid else None,
    )  # fmt: skip
    return read_data(inputs, OptimizeOptions(budget=Budget(speedup=1.0), **options), LABELS)


def named(prefix: str, rows: int) -> list[tuple[str, str]]:
    return [(f"{prefix} {row}", LABELS[row % 3]) for row in range(rows)]


def test_the_three_splits_have_no_text_in_common(tmp_path: Path) -> None:
    train = [*named("only", 60), *named("both", 6), ("Both 1", "Good")]
    found = read_all(tmp_path, train, [*named("test", 9), *named("both", 6)])
    parts = [{normalised(text) for text in part.texts} for part in (found.train, found.valid, found.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert set(found.removed) == {*(f"both {row}" for row in range(6)), "Both 1"}
    assert len(found.train) + len(found.valid) == 60
    assert len(found.test) == 15


def test_given_validation_data_are_cleaned_of_test_texts(tmp_path: Path) -> None:
    valid = [*named("valid", 9), ("test 0", "Bad"), ("only 3", "Bad")]
    found = read_all(tmp_path, named("only", 30), named("test", 9), valid=valid)
    assert "test 0" not in found.valid.texts
    assert "only 3" in found.valid.texts
    assert "only 3" not in found.train.texts
    assert set(found.removed) == {"test 0", "only 3"}


def test_strict_refuses_overlap(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 texts stand in two splits, such as 'test 2'; --strict"):
        read_all(tmp_path, [*named("only", 60), ("test 2", "Bad")], named("test", 9), strict=True)


def test_a_text_that_stands_twice_in_one_file_is_no_overlap_of_two(tmp_path: Path) -> None:
    doubled = [*named("only", 60), *named("only", 60)]
    found = read_all(tmp_path, doubled, named("test", 9), strict=True)
    assert not {normalised(t) for t in found.train.texts} & {normalised(t) for t in found.valid.texts}


def test_training_data_that_are_all_test_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.csv"):
        read_all(tmp_path, named("test", 9), named("test", 9))


def test_validation_data_that_are_all_test_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"valid\.csv: no rows are left"):
        read_all(tmp_path, named("only", 30), named("test", 9), valid=named("test", 9))


def test_training_data_of_which_one_class_is_left_are_refused(tmp_path: Path) -> None:
    train = [*named("test", 9), *((f"only {row}", "Bad") for row in range(9))]
    with pytest.raises(DataError, match=r"train\.csv: one class is left"):
        read_all(tmp_path, train, named("test", 9), valid=named("valid", 9))


def test_validation_rows_of_one_class_are_refused(tmp_path: Path) -> None:
    valid = [*((f"valid {row}", "Bad") for row in range(9)), ("test 1", "Good")]
    with pytest.raises(DataError, match=r"valid\.csv: the 9 rows left to choose by, .*, are of one class"):
        read_all(tmp_path, named("only", 30), named("test", 9), valid=valid)


def test_validation_rows_are_capped(tmp_path: Path) -> None:
    found = read_all(tmp_path, named("only", 300), named("test", 9), valid_rows=30)
    assert len(found.valid) == 30
    assert Counter(found.valid.labels) == {0: 10, 1: 10, 2: 10}


def test_splits_of_which_one_tells_ids_and_one_names_that_are_numbers_are_refused(tmp_path: Path) -> None:
    stars = ("1", "2", "3")
    train, test = (
        [(f"{part} {row}", str(row % 3 + first)) for row in range(12)] for part, first in (("a", 0), ("b", 1))
    )
    inputs = Inputs(model="", train=write_csv(tmp_path / "a.csv", train), test=write_csv(tmp_path / "b.csv", test))
    options = OptimizeOptions(budget=Budget(speedup=1.0))
    with pytest.raises(DataError, match=r"the labels of .*a\.csv can only be ids, those of .*b\.csv may be"):
        read_data(inputs, options, stars)
    other = write_csv(tmp_path / "c.csv", [(text.replace("b", "c"), label) for text, label in test])
    assert len(read_data(replace(inputs, train=other), replace(options, valid_share=0.3), stars).test) == 12
