"""The report: its JSON contract, what it computes, what it escapes, and that it is a pure function."""

from __future__ import annotations

import builtins
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hasten import report_words as words
from hasten.budget import Budget
from hasten.errors import MeasurementError, MissingExtraError
from hasten.intervals import Interval
from hasten.measurement import GROUPS, Host, Latency, LengthRow, Measurement, Quality, Scenario, speedup
from hasten.report import Report, RunInfo, ShapeRow, compare, load_report
from hasten.report_charts import Box, Frame, Mark, label_places
from hasten.report_render import Form, render, save_report
from hasten.report_views import shapes_as_terminal
from hasten.variant import Parameters

FORMS: tuple[Form, ...] = ("json", "terminal", "markdown", "html")
EVIL = "<script>alert('x')</script>"
HOST = Host(
    cpu="Test CPU", cores=2, instructions=("avx2", "avx512_vnni"), memory_bytes=8_000_000_000, system="Linux",
    python="3.12.1", versions={"hasten": "0.1.0", "onnxruntime": "1.22.0"},
)  # fmt: skip
SCENARIO = Scenario(name="test", split="test", workload_digest="ab" * 32, threads=1, warmup=20, key="run-1")


def a_measurement(
    name: str = "torch-fp32", *, p50_ms: float = 20.0, right: int = 930, rows: int = 1000, samples: int = 320,
    seed: int = 0, key: str = "run-1", size_bytes: int = 90_900_000,
) -> Measurement:  # fmt: skip
    tokens = np.random.default_rng(0).integers(4, 128, samples)
    spread = np.random.default_rng(seed).lognormal(0.0, 0.05, samples)
    latency_ms = p50_ms * (0.4 + 0.6 * tokens / 66) * spread
    weights = {group: p50_ms / (place + 2) for place, group in enumerate(GROUPS)}
    expected = tuple(row % 2 for row in range(rows))
    return Measurement(
        schema="hasten.measurement/1", variant=name, digest="cd" * 32, format=name.partition("-")[0],
        precision=name.rpartition("-")[2],
        parameters=Parameters(embedding=11_720_000, encoder=10_000_000, head=149_000),
        size_bytes=size_bytes, peak_memory_bytes=410_000_000, host=HOST, scenario=replace(SCENARIO, key=key),
        latency=Latency(
            samples_ms=tuple(latency_ms.tolist()), tokens=tuple(tokens.tolist()),
            tokenizer_ms=tuple((latency_ms * 0.03).tolist()),
        ),
        quality=Quality(
            predictions=tuple(label if row < right else 1 - label for row, label in enumerate(expected)),
            expected=expected,
        ),
        breakdown_ms=weights,
    )  # fmt: skip


def a_family(*, rows: int = 1000, samples: int = 320) -> list[Measurement]:
    def member(name: str, p50_ms: float, right: int, seed: int, size_bytes: int) -> Measurement:
        return a_measurement(
            name, p50_ms=p50_ms, right=right, rows=rows, samples=samples, seed=seed, size_bytes=size_bytes
        )

    return [
        member("torch-fp32", 20.0, 930, 0, 90_900_000),
        member("onnx-fp32", 11.0, 930, 1, 90_900_000),
        member("onnx-int8", 5.5, 926, 2, 23_100_000),
        member("student-2x128-int8", 1.1, 880, 3, 5_200_000),
    ]


def a_run(**changes: object) -> RunInfo:
    return replace(
        RunInfo(
            budget=Budget(p99_ms=20, speedup=2, retain=0.98),
            baseline="torch-fp32",
            chosen="onnx-int8",
            command="hasten optimize ./model --data reviews.csv --p99-ms 20",
            model="./model",
            rows={"train": 5000, "valid": 500, "test": 1000},
        ),
        **changes,  # pyright: ignore[reportArgumentType]
    )


@pytest.fixture(scope="module")
def report() -> Report:
    shape = ShapeRow(
        name="2x128", layers=2, hidden=128, parameters=4_400_000, fits=True, chosen=True,
        p50_ms=Interval(value=1.1, lower=1.0, upper=1.3), p99_ms=Interval(value=2.0, lower=1.8, upper=None),
        speedup=Interval(value=18.0, lower=16.0, upper=19.0),
    )  # fmt: skip
    steps = {"onnx-fp32": {"largest_logit_difference": 1.2e-6, "fused": {"Attention": 6}, "texts": [1, 2]}}
    run = a_run(
        removed=tuple(f"text {i}" for i in range(9)), notes=("The teacher was left as it is.",), shapes=(shape,)
    )
    return compare(a_family(), replace(run, steps=steps))


def test_json_holds_the_contract(report: Report) -> None:
    tree = json.loads(render(report, "json"))

    assert tree["schema"] == "hasten.report/3"
    assert {"budget", "baseline", "chosen", "verdict", "host", "variants"} <= set(tree)
    for row in tree["variants"]:
        assert {"name", "format", "precision", "parameters", "size_bytes", "speedup", "verdict", "reasons"} <= set(row)
        assert set(row["accuracy"]) == {"value", "lower", "upper", "n"}
        assert set(row["retention"]) == {"value", "lower", "upper"}
        assert {"mean", "p50", "p95", "p99", "p99_lower", "p99_upper", "n"} <= set(row["latency_ms"])
        assert isinstance(row["parameters"], int)
        assert isinstance(row["speedup"], float)
        assert all(isinstance(reason, str) for reason in row["reasons"])


def test_json_equals_direct_computation(report: Report) -> None:
    base, _, int8, _ = a_family()
    row = next(row for row in json.loads(render(report, "json"))["variants"] if row["name"] == "onnx-int8")
    samples = np.asarray(int8.latency.samples_ms)

    assert row["latency_ms"]["mean"] == pytest.approx(samples.mean())
    assert row["latency_ms"]["p95"] == pytest.approx(np.percentile(samples, 95))
    assert row["latency_ms"]["p99_upper"] == int8.latency.percentile(99).upper
    assert row["latency_ms"]["n"] == 320
    assert row["speedup"] == speedup(base, int8).value
    assert row["speedup_interval"]["lower"] == speedup(base, int8).lower
    assert row["accuracy"]["value"] == 0.926
    assert row["retention"]["value"] == pytest.approx(926 / 930)
    assert row["parameters"] == 21_869_000 == sum(row["parameters_by_part"].values())
    assert row["verdict"] == "met"


def test_baseline_stands_first_then_slowest_to_fastest(report: Report) -> None:
    assert [row.name for row in report.variants] == ["torch-fp32", "onnx-fp32", "onnx-int8", "student-2x128-int8"]
    assert report.baseline_row.speedup_interval == Interval(value=1.0, lower=1.0, upper=1.0)


def test_nothing_chosen_is_missed_and_gives_every_reason() -> None:
    report = compare(a_family(), a_run(budget=Budget(p99_ms=0.5), chosen=None))
    tree = json.loads(render(report, "json"))

    assert tree["chosen"] is None
    assert tree["verdict"] == "missed"
    for form in FORMS[1:]:
        text = render(report, form)
        assert "No variant passed on the validation split; none is chosen." in text
        assert "against at most 0.5 ms: missed" in text


def test_undecided_tells_what_would_decide() -> None:
    report = compare(a_family(rows=940), a_run(budget=Budget(speedup=2, retain=0.994)))
    row = report.chosen_row

    assert row is not None
    assert report.verdict == "undecided"
    assert row.needed["retention"] > 940
    for form in FORMS[1:]:
        text = render(report, form)
        assert "What would decide" in text
        assert f"about {row.needed['retention']:,} labelled test rows" in text


@pytest.mark.parametrize(("retain", "leaning"), [(0.994, "looks as if it meets"), (0.997, "comes near")])
def test_undecided_says_to_which_side_it_leans(retain: float, leaning: str) -> None:
    report = compare(a_family(rows=940), a_run(budget=Budget(speedup=2, retain=retain)))
    assert report.verdict == "undecided"
    said = f"{report.chosen} {leaning} the budget, but these measurements cannot prove it: "
    assert words.headline(report).startswith(said)


def test_a_baseline_that_meets_the_budget_is_reported_as_it_is() -> None:
    report = compare([a_measurement()], a_run(budget=Budget(p99_ms=90), chosen="torch-fp32"))

    assert words.headline(report).startswith("torch-fp32 meets the budget: p99 ")
    assert words.headline(report).endswith("93.0% accuracy, as it was brought in.")
    assert all("torch-fp32" in render(report, form) for form in FORMS)


def test_a_chosen_variant_that_misses_says_so() -> None:
    report = compare(a_family()[:3], a_run(budget=Budget(speedup=20)))

    assert report.verdict == "missed"
    assert words.headline(report).startswith("onnx-int8 misses the budget: ")


def test_few_samples_leave_limits_open_in_every_form() -> None:
    report = compare(a_family(samples=60), a_run())

    assert report.verdict == "undecided"
    assert json.loads(render(report, "json"))["variants"][0]["latency_ms"]["p99_upper"] is None
    assert "–?" in render(report, "markdown")
    assert "–?" in render(report, "html")


def test_the_same_measurements_give_the_same_bytes(report: Report) -> None:
    first, second = compare(a_family(), a_run()), compare(a_family()[::-1], a_run())

    assert [row.name for row in first.variants] == [row.name for row in report.variants]
    for form in FORMS:
        assert render(first, form) == render(second, form)


def test_html_escapes_every_foreign_text() -> None:
    evil = a_measurement(f"onnx-{EVIL}", p50_ms=5, seed=4)
    run = a_run(
        removed=(EVIL,), notes=(EVIL,), model=EVIL, command=EVIL, chosen=evil.variant, rows={EVIL: 1},
        steps={evil.variant: {EVIL: EVIL}},
    )  # fmt: skip
    host = replace(HOST, cpu=EVIL, versions={EVIL: EVIL})
    family = [replace(each, host=host, breakdown_ms={EVIL: 1.0}) for each in (a_measurement(), evil)]
    page = render(compare(family, run), "html")

    assert "<script>alert" not in page
    assert page.count("</script>") == 4
    assert "&lt;script&gt;alert" in page


def test_html_loads_nothing(report: Report) -> None:
    page = render(report, "html")
    own = re.sub(r"<script>/\*\*.*?</script>", "", page, flags=re.DOTALL)

    assert len(own) < 0.05 * len(page)
    assert "http:" not in own
    assert "https:" not in own
    assert not re.search(r"<(script|img|iframe|link)[^>]+(src|href)=", page)
    assert "default-src 'none'" in own


def test_html_draws_the_budget_on_its_own_axis() -> None:
    by_p99 = render(compare(a_family(), a_run()), "html")
    by_speed = render(compare(a_family(), a_run(budget=Budget(speedup=2))), "html")

    assert "p99 latency of one text (ms, logarithmic)" in by_p99
    assert "p50 latency of one text (ms, logarithmic)" in by_speed
    assert "accuracy (share of rows right)" in by_p99


def test_labels_of_close_marks_stand_apart() -> None:
    frame = Frame(low=1, high=100, bottom=0.8, top=1.0, limit_ms=10, floor=0.9)
    marks = [Mark(name, 300, y, [Box(291, y - 9, 309, y + 9)]) for name, y in (("onnx-fp32", 300), ("onnx-int8", 304))]
    places = label_places(frame, marks)

    assert places["onnx-fp32"] != places["onnx-int8"]


def test_markdown_shows_foreign_texts_as_they_are() -> None:
    run = a_run(removed=("a | b\n\n# c `d`",), model="x*y*", command="echo ```")
    text = render(compare(a_family(), run), "markdown")

    assert r"- a \| b # c \`d\`" in text
    assert r"# hasten: x\*y\*" in text
    assert "````sh\necho ```\n````" in text


def test_markdown_has_every_section(report: Report) -> None:
    text = render(report, "markdown")

    for part in (
        "Where the time goes",
        "by length",
        "Machine",
        report.command,
        "9 texts removed",
        "2x128",
        "left as it is",
    ):
        assert part in text
    assert "text 4" in text
    assert "text 5" not in text


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_terminal_fits_and_names_every_variant(report: Report, width: int) -> None:
    lines = render(report, "terminal", width=width).splitlines()

    assert max(map(len, lines)) <= width
    for row in report.variants:
        assert any(row.name in line and row.verdict in line for line in lines)
    assert any(line.startswith(f"{words.MARK} onnx-int8") for line in lines)


def test_terminal_shows_no_control_characters_and_colour_only_when_asked(report: Report) -> None:
    plain = render(compare(a_family(), a_run(model="\x1b[31mred")), "terminal")

    assert "\x1b" not in plain
    assert "\x1b[" in render(report, "terminal", color=True)


def test_save_writes_what_render_gives_and_reads_back(report: Report, tmp_path: Path) -> None:
    save_report(report, tmp_path / "out")

    names: dict[str, Form] = {"report.json": "json", "report.md": "markdown", "report.html": "html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    for name, form in names.items():
        assert (tmp_path / "out" / name).read_text(encoding="utf-8") == render(report, form)
    again = load_report(tmp_path / "out" / "report.json")
    assert all(render(again, form) == render(report, form) for form in FORMS)


def test_what_is_not_a_report_is_refused(tmp_path: Path, report: Report) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text(render(replace(report, schema="hasten.report/0"), "json"))

    for name in ("a.json", "b.json", "missing.json"):
        with pytest.raises(MeasurementError, match=name):
            load_report(tmp_path / name)


def test_measurements_of_other_runs_are_refused() -> None:
    family = [*a_family()[:2], a_measurement("onnx-int8", key="run-2")]

    with pytest.raises(MeasurementError, match="onnx-int8 and torch-fp32 were measured in different runs"):
        compare(family, a_run())


@pytest.mark.parametrize("missing", ["torch-fp32", "onnx-int8"])
def test_missing_baseline_or_chosen_is_refused(missing: str) -> None:
    with pytest.raises(MeasurementError, match=missing):
        compare([each for each in a_family() if each.variant != missing], a_run())


def test_a_variant_twice_is_refused() -> None:
    with pytest.raises(MeasurementError, match="twice"):
        compare([*a_family(), a_measurement()], a_run())


@pytest.mark.parametrize("package", ["jinja2", "plotly.offline"])
def test_html_without_the_extra_says_what_to_install(
    package: str, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **named: object) -> object:
        if name == package:
            raise ImportError(name=name)
        return real(name, *rest, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"hasten\[optimize\]"):
        save_report(report, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert render(report, "markdown")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0123, "0.012"),
        (0.123, "0.123"),
        (0.9996, "1.00"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1234.5, "1,234"),
    ],
)
def test_milliseconds_at_three_digits(value: float, shown: str) -> None:
    assert words.ms(value) == shown


def test_lengths_that_are_alike_have_a_row_each(report: Report) -> None:
    longest = LengthRow(low_tokens=512, high_tokens=512, p50_ms=Interval(value=9.0, lower=8.0, upper=10.0), n=20)
    rows = tuple(
        replace(row, latency_by_length=(longest, replace(longest, p50_ms=replace(longest.p50_ms, value=9.5))))
        for row in report.variants
    )
    first, second = words.length_grid(replace(report, variants=rows)).rows
    assert (first[:2], second[:2]) == (("512–512", "9.00"), ("512–512", "9.50"))


@pytest.mark.parametrize(("number", "shown"), [(999, "999"), (9999, "9,999"), (12_345, "12 k"), (22_713_000, "22.7 M")])
def test_counts(number: int, shown: str) -> None:
    assert words.count(number) == shown


def test_the_budgets_line_stands_between_the_shapes_that_fit_and_those_that_do_not() -> None:
    def shape(name: str, p50_ms: float, *, fits: bool, chosen: bool = False) -> ShapeRow:
        p50, p99, ratio = (
            Interval(value=value, lower=0.9 * value, upper=1.1 * value) for value in (p50_ms, 2 * p50_ms, 20 / p50_ms)
        )
        return ShapeRow(
            name=name, layers=1, hidden=64, parameters=1_000_000, p50_ms=p50, p99_ms=p99, speedup=ratio, fits=fits,
            chosen=chosen,
        )  # fmt: skip

    fitting, slow = shape("3x384", 2.2, fits=True, chosen=True), shape("6x384", 4.4, fits=False)
    shown = shapes_as_terminal([fitting, slow], Budget(p99_ms=5, speedup=8))
    firsts = [line.split()[0] for line in shown.splitlines() if line.split()]
    assert firsts == ["Budget:", "layers", "─" * len(firsts[2]), "3x384", "budget", "6x384", "3x384"]
    assert "≤ 5" in shown
    assert "≥ 8×" in shown
    assert "2.20 (1.98–2.42)" in shown
    assert "9.09× (8.18–10.0)" in shown
    assert "the next larger one does not" in shown
    before = shapes_as_terminal([shape("2x128", 4.4, fits=False), fitting], Budget(p99_ms=5))
    assert "no larger one was measured" in before
    none = shapes_as_terminal([shape("6x384", 4.4, fits=False, chosen=True)], Budget(p99_ms=5))
    assert "No shape keeps the latency budget with headroom; 6x384 is the fastest that was measured." in none
    assert "budget" not in shapes_as_terminal([fitting], Budget(p99_ms=5)).splitlines()[-2]
