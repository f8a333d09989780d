"""Workloads: what is read from files, what is refused and how it is said, splits and overlaps."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from conftest import write_csv
from hasten.errors import DataError
from hasten.workload import (
    Workload,
    read_texts,
    read_workload,
)

LABELS = ("Bad", "Good", "Mixed")
ROWS = [("awful film", "Bad"), ("great film", "Good"), ("so so", "Mixed"), ("great again", "Good")]
TEXTS, IDS = tuple(text for text, _ in ROWS), (0, 1, 2, 1)


def read(source: Path | str, **options: Any) -> Workload:
    return read_workload(str(source), name="test", **({"labels": LABELS} | options))


def refused(source: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(source, **options)
    assert str(source) in str(caught.value)
    return str(caught.value)


def table(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def as_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_parquet(path: Path, columns: dict[str, list[Any]], label_names: list[str] | None = None) -> Path:
    from datasets import ClassLabel, Dataset

    made = Dataset.from_dict(columns)
    if label_names:
        made = made.cast_column("label", ClassLabel(names=label_names))
    made.to_parquet(path)
    return path


def test_csv(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "data.csv", ROWS)
    found = read(path)
    assert (found.name, found.source, found.texts, found.labels) == ("test", path, TEXTS, IDS)
    assert len(found) == 4


def test_texts_need_no_labels(tmp_path: Path) -> None:
    source = tmp_path / "texts.csv"
    source.write_text('text\nfine\n"awful, really"\n', encoding="utf-8")
    assert read_texts(str(source)) == ("fine", "awful, really")
    with pytest.raises(DataError, match="'body'"):
        read_texts(str(source), text_column="body")
    source.write_text("text\n", encoding="utf-8")
    with pytest.raises(DataError, match="no rows"):
        read_texts(str(source))


def test_csv_with_quotes_commas_and_line_breaks_inside(tmp_path: Path) -> None:
    texts = ['say "no", please', "two\nlines", "naïve café, 東京"]
    found = read(table(tmp_path / "data.csv", list(zip(texts, ("Bad", "Good", "Bad"), strict=True))))
    assert found.texts == tuple(texts)


def test_tsv_keeps_quotes(tmp_path: Path) -> None:
    path = tmp_path / "data.tsv"
    path.write_text('text\tlabel\n"quoted" start\tBad\nan open " quote\tGood\nplain, comma\tMixed\n', encoding="utf-8")
    found = read(path)
    assert found.texts == ('"quoted" start', 'an open " quote', "plain, comma")
    assert found.labels == (0, 1, 2)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": text, "label": label} for text, label in ROWS]
    found = read(as_lines(tmp_path / f"data{suffix}", rows))
    assert (found.texts, found.labels) == (TEXTS, IDS)


def test_parquet(tmp_path: Path) -> None:
    found = read(as_parquet(tmp_path / "data.parquet", {"text": list(TEXTS), "label": [label for _, label in ROWS]}))
    assert (found.texts, found.labels) == (TEXTS, IDS)


def test_parquet_that_pandas_wrote_with_its_index(tmp_path: Path) -> None:
    import pandas

    path = tmp_path / "data.parquet"
    rows = pandas.DataFrame({"text": list(TEXTS), "label": [label for _, label in ROWS]})
    rows.set_index(pandas.Index([9, 2, *range(20, 18 + len(rows))])).to_parquet(path)  # as of a frame that was filtered
    assert "__index_level_0__" in pq.read_schema(path).names
    assert read(str(path)).texts == TEXTS


def test_parquet_with_class_names_goes_by_name(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "data.parquet", {"text": list(TEXTS), "label": [2, 0, 1, 0]}, ["Good", "Mixed", "Bad"])
    assert read(path).labels == IDS


def test_ids_stay_ids_where_the_model_has_no_names(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "data.parquet", {"text": list(TEXTS), "label": [2, 0, 1, 0]}, ["Good", "Mixed", "Bad"])
    assert read(path, labels=("LABEL_0", "LABEL_1", "LABEL_2")).labels == (2, 0, 1, 0)
    assert "'Bad' (1 rows)" in refused(path, labels=("LABEL_0", "LABEL_1"))


def test_each_part_of_a_large_file_is_read_alike(tmp_path: Path) -> None:
    rows = [(f"text {row}", f"0{row % 2 + 1}", "1" if row < 15_000 else "") for row in range(20_001)]
    rows[-1] = ("7", "02", "4.5")
    found = read(table(tmp_path / "data.csv", rows, ("text", "label", "rating")), labels=("01", "02"))
    assert (found.texts[-1], found.labels[:2], found.labels[-1]) == ("7", (0, 1), 1)


def test_a_local_folder_by_split(tmp_path: Path) -> None:
    for name in ("train", "test", "validation"):
        write_csv(tmp_path / f"{name}.csv", [(f"{name} {text}", label) for text, label in ROWS])
    assert read(tmp_path).texts[0] == "test awful film"
    assert read(f"{tmp_path}@train").texts[0] == "train awful film"
    valid = read_workload(str(tmp_path), name="valid", labels=LABELS)
    assert (valid.name, valid.texts[0]) == ("valid", "validation awful film")


def test_a_split_that_a_folder_lacks_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    assert "unpublished" in refused(f"{tmp_path}@unpublished")


@pytest.mark.parametrize("text", ["NA", "null", "None", "nan", "N/A", "1.5", "007", "true", "2024-01-01"])
def test_a_text_stays_a_text(tmp_path: Path, text: str) -> None:
    rows = [(text, "Bad"), ("great", "Good")]
    assert read(write_csv(tmp_path / "data.csv", rows)).texts[0] == text
    assert read(as_lines(tmp_path / "data.jsonl", [{"text": t, "label": n} for t, n in rows])).texts[0] == text
    (tmp_path / "set").mkdir()
    write_csv(tmp_path / "set" / "test.csv", [(text, "Bad"), ("great", "Good")])
    if text in {"NA", "null", "None", "nan", "N/A"}:
        assert read(tmp_path / "set").texts[0] == text


@pytest.mark.parametrize(
    "column",
    [
        ["Bad", "Good", "Mixed"],
        ["0", "1", "2"],
        ["bad", "GOOD", " Mixed "],
        [0, 1, 2],
        [0.0, 1.0, 2.0],
        ["0.0", "1.0", "2.0"],
    ],
)
def test_labels_by_name_by_id_or_in_another_case(tmp_path: Path, column: list[Any]) -> None:
    rows = [(f"text {i}", label) for i, label in enumerate(column)]
    assert read(table(tmp_path / "data.csv", rows)).labels == (0, 1, 2)


def test_names_that_differ_only_in_case_are_told_apart(tmp_path: Path) -> None:
    path = table(tmp_path / "data.csv", [("one", "US"), ("two", "us")])
    assert read(path, labels=("us", "US")).labels == (1, 0)
    assert "'Us' (1 rows)" in refused(table(tmp_path / "odd.csv", [("a", "Us"), ("b", "us")]), labels=("us", "US"))


def test_spaces_round_a_name_are_of_no_matter(tmp_path: Path) -> None:
    path = table(tmp_path / "data.csv", [("one", "Billing "), ("two", " Sales"), ("three", "sales")])
    assert read(path, labels=("Billing ", "Sales")).labels == (0, 1, 1)


def test_a_column_holds_names_or_ids_and_not_both(tmp_path: Path) -> None:
    assert "'0' (1 rows)" in refused(table(tmp_path / "mixed.csv", [("a", "0"), ("b", "Good"), ("c", "Bad")]))
    shifted = table(tmp_path / "ids.csv", [("a", "0"), ("b", "1"), ("c", "2")])
    assert read(shifted, labels=("1", "2", "3")).labels == (0, 1, 2)


def test_a_path_is_no_pattern(tmp_path: Path) -> None:
    table(tmp_path / "data1.csv", [("another", "Bad"), ("file", "Good")])
    chosen = table(tmp_path / "data[1].csv", [("the file", "Bad"), ("that was named", "Good")])
    assert read(chosen).texts == ("the file", "that was named")


def test_texts_of_a_folder_are_those_of_the_named_split(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for part in ("train", "test"):
        table(tmp_path / "set" / f"{part}.csv", [(f"of {part}", "Bad"), ("other", "Good")])
    assert read_texts(str(tmp_path / "set"))[0] == "of train"
    assert read_texts(str(tmp_path / "set"), name="test")[0] == "of test"


def test_a_label_named_like_an_id_goes_by_its_name(tmp_path: Path) -> None:
    path = table(tmp_path / "data.csv", [("a", "1"), ("b", "0")])
    assert read(path, labels=("1", "0")).labels == (0, 1)


def test_unknown_labels_are_named_with_counts(tmp_path: Path) -> None:
    rows = [*ROWS, ("a", "Odd"), ("b", "Odd"), ("c", "7")]
    said = refused(write_csv(tmp_path / "data.csv", rows))
    assert "'Odd' (2 rows), '7' (1 rows)" in said
    assert "'Bad', 'Good', 'Mixed'" in said


def test_a_negative_id_is_unknown(tmp_path: Path) -> None:
    assert "'-1' (1 rows)" in refused(as_parquet(tmp_path / "d.parquet", {"text": ["a", "b"], "label": [-1, 1]}))


def test_a_missing_label_is_unknown(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": None}, {"text": "b", "label": "Good"}]
    for labels in (LABELS, ("Good", "None")):
        assert "'' (1 rows)" in refused(as_lines(tmp_path / "data.jsonl", rows), labels=labels)
    assert "'' (1 rows)" in refused(table(tmp_path / "data.csv", [("a", ""), ("b", "Good")]))


def test_usual_column_names_are_found_in_any_case(tmp_path: Path) -> None:
    path = table(tmp_path / "data.csv", [(str(i), text, label) for i, (text, label) in enumerate(ROWS)],
                 ("id", "Sentence", "INTENT"))  # fmt: skip
    assert (read(path).texts, read(path).labels) == (TEXTS, IDS)


def test_chosen_columns(tmp_path: Path) -> None:
    path = table(tmp_path / "data.csv", [("wrong", "0", *row) for row in ROWS], ("text", "label", "body", "kind"))
    found = read(path, text_column="body", label_column="kind")
    assert (found.texts, found.labels) == (TEXTS, IDS)
    said = refused(path, text_column="bodi")
    assert "no column 'bodi'; it has 'text', 'label', 'body', 'kind'" in said
    assert "no column 'sort'" in refused(path, label_column="sort")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (("words", "label"), "no column that --text-column could mean; name one of 'words', 'label'"),
        (("text", "tag"), "no column that --label-column could mean"),
    ],
)
def test_a_column_that_cannot_be_guessed_is_asked_for(tmp_path: Path, header: tuple[str, ...], says: str) -> None:
    assert says in refused(table(tmp_path / "data.csv", ROWS, header))


def test_ambiguous_columns_are_asked_for(tmp_path: Path) -> None:
    two_texts = table(tmp_path / "a.csv", [(*row, "x") for row in ROWS], ("text", "label", "review"))
    two_labels = table(tmp_path / "b.csv", [(*row, "x") for row in ROWS], ("text", "label", "category"))
    assert "2 columns that --text-column could mean" in refused(two_texts)
    assert "2 columns that --label-column could mean" in refused(two_labels)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.touch()
    assert "the file is empty" in refused(path)


def test_a_header_without_rows(tmp_path: Path) -> None:
    assert "no rows" in refused(write_csv(tmp_path / "data.csv", []))


def test_one_class(tmp_path: Path) -> None:
    said = refused(write_csv(tmp_path / "data.csv", [("a", "Good"), ("b", "Good")]))
    assert "all 2 rows have the label 'Good'" in said


@pytest.mark.parametrize("empty", ["", "   ", "\t\n", "\u00a0"])
def test_an_empty_text_is_named_by_its_row(tmp_path: Path, empty: str) -> None:
    rows = [*ROWS, (empty, "Good"), ("more", "Bad")]
    assert "row 5: the text is empty" in refused(write_csv(tmp_path / "data.csv", rows))


def test_what_is_no_text_is_named_by_its_row(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "data.parquet", {"text": ["a", None, "b"], "label": ["Bad", "Good", "Bad"]})
    assert "row 2: column 'text' holds None" in refused(path)
    numbers = as_parquet(tmp_path / "numbers.parquet", {"text": [4, 5], "label": ["Bad", "Good"]})
    assert "row 1: column 'text' holds 4, not a text; name --text-column" in refused(numbers)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_file_that_is_no_utf8(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes("text,label\ncafé,Bad\nthé,Good\n".encode("latin-1"))
    assert "cannot be read: " in refused(path)


def test_ragged_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label\none,Bad\ntwo,Good,extra,more\n", encoding="utf-8")
    assert "cannot be read: " in refused(path)


@pytest.mark.parametrize("rows", ["Paris, France,Good\nRome, Italy,Bad\n", "Paris, France,Good\nRome,Bad\n"])
def test_commas_outside_of_quotes_shift_no_column(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label\n" + rows, encoding="utf-8")
    assert "rows have more fields than the header has columns; put texts with separators in quotes" in refused(path)


@pytest.mark.parametrize("name", ["none.csv", "none.jsonl", "none.parquet"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    assert "no such file" in refused(tmp_path / name)


def test_a_kind_of_file_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.xlsx"
    path.write_bytes(b"PK")
    said = refused(path)
    assert "not a kind of file hasten reads" in said
    assert ".parquet" in said


def test_nothing_is_written_beside_the_file(tmp_path: Path) -> None:
    read(write_csv(tmp_path / "data.csv", ROWS))
    assert [p.name for p in tmp_path.iterdir()] == ["data.csv"]
