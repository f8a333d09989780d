"""The result of the comparison as Markdown."""

from __future__ import annotations

from typing import Any

from peers.measuring import FAITHFUL


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table whose first column is text."""
    rule = [":---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)] + [""]


def interval(values: dict[str, float | None], *, digits: int = 2, scale: float = 1.0) -> str:
    """A value with its interval."""
    value, lower, upper = (values[key] for key in ("value", "lower", "upper"))
    shown = f"{value * scale:.{digits}f}" if value is not None else "–"
    if lower is None or upper is None:
        return shown
    return f"{shown} ({lower * scale:.{digits}f}–{upper * scale:.{digits}f})"


def markdown(result: dict[str, Any]) -> str:
    """The tables: against the fastest peer, latencies, ratios, quality, what failed, what each row is."""
    made = [row for row in result["rows"] if row["error"] is None]
    lines = [f"# hasten's graphs and those of its peers: {result['model']}", "", _conditions(result), ""]
    lines += ["## Times faster than the fastest peer of each length", "", *_fastest(result)]
    for precisions in (("fp32", "bf16"), ("int8", "int8+bf16")):
        names = [row["name"] for row in made if row["precision"] in precisions]
        lines += [f"## Median latency, {' and '.join(precisions)} (ms)", "", *_latencies(result, names)]
    own = ["static / dynamic", *(interval(row["static_to_dynamic"]) for row in result["latency"])]
    lines += ["## How many times faster static INT8 is than dynamic INT8 of the same graph", ""]
    lines += table(["", *_lengths(result)], [own])
    lines += ["## How many times faster than each peer", "", *_ratios(result)]
    lines += ["## Answers", "", *_quality(result, made)]
    lines += ["## What each row is", "", *_about(result["rows"])]
    return "\n".join(lines).rstrip() + "\n"


def _conditions(result: dict[str, Any]) -> str:
    return (
        f"{result['architecture']}, {result['parameters'] / 1e6:.1f} M parameters, on {result['host']['cpu']}; "
        f"{result['threads']} threads for every graph; {result['launches']} launches of all graphs, in each "
        f"{result['requests']} requests a length and graph ({result['requests_as_they_come']} of test "
        "texts as they come, each asked once before), one text at a time, tokenizer included, in random order. "
        "In brackets: 95 % intervals over launches. "
        f"Accuracy on {result['test_rows']:,} rows."
    )


def _lengths(result: dict[str, Any]) -> list[str]:
    return [f"{row['tokens']} tokens" if row["tokens"] else "as they come" for row in result["latency"]]


def _fastest(result: dict[str, Any]) -> list[str]:
    """By length, the peer with the lowest median, and how many times faster each of hasten's graphs is."""
    rows: list[list[str]] = []
    for ours in (name for row in result["latency"][:1] for name in row["times_faster"]):
        cells = [ours]
        for row in result["latency"]:
            ratios = row["times_faster"][ours]
            if peer := min(ratios, key=lambda name: ratios[name]["value"], default=None):
                cells.append(f"{interval(ratios[peer])} × {peer}")
        rows.append(cells)
    return table(["", *_lengths(result)], rows)


def _latencies(result: dict[str, Any], names: list[str]) -> list[str]:
    rows = [[name, *(interval(row["p50_ms"][name]) for row in result["latency"])] for name in names]
    return table(["", *_lengths(result)], rows)


def _ratios(result: dict[str, Any]) -> list[str]:
    first: dict[str, Any] = result["latency"][0]["times_faster"]
    rows = [
        [f"{ours} / {peer}", *(interval(row["times_faster"][ours][peer]) for row in result["latency"])]
        for ours, peers in first.items()
        for peer in peers
    ]
    return table(["", *_lengths(result)], rows)


def _quality(result: dict[str, Any], made: list[dict[str, Any]]) -> list[str]:
    head = ["", "size (MB)", "accuracy (%)", "other answers than PyTorch", "max. Δlogit from PyTorch, padded"]
    head += ["flips in company", "max. Δlogit in company"]
    rows = [["PyTorch", "", interval(result["pytorch_accuracy"], scale=100), "0", "", "", ""]]
    for row in made:
        company, moved = row["company"], f"{row['max_logit_difference_from_pytorch']:.2g}"
        if row["faithful"] is False:
            moved += f" (above {FAITHFUL:g})"
        rows.append([
            row["name"], f"{row['size_bytes'] / 1e6:.1f}", interval(row["accuracy"], scale=100),
            str(row["answers_other_than_pytorch"]), moved,
            str(company["label_flips"]), f"{company['max_logit_difference']:.2g}",
        ])  # fmt: skip
    return table(head, rows)


def _about(rows: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for row in rows:
        versions = row["versions"] | (row.get("runtime") or {})
        known = ", ".join(f"{name} {version}" for name, version in versions.items())
        failed = f" **Failed:** {row['error']}" if row["error"] else ""
        lines.append(f"- `{row['name']}` ({row['peer']}): {row['how'] or 'no row could be made'}. {known}.{failed}")
    return lines
