"""hasten's graphs against those of its peers: latency by length, parity, accuracy, batch invariance.

    python benchmarks/against_peers.py TORCH_VARIANT --train FILE --valid FILE --test FILE [--envs FOLDER] [--out OUT]

TORCH_VARIANT and the three files are what `teachers.py` makes. The peers are onnxruntime's own tools, optimum-onnx,
OpenVINO with NNCF, Olive, and the ONNX backend of sentence-transformers. Each builds its graphs in an environment of
its own, made from `peers/<name>.txt`, by `peers/build_<name>.py`, and `peers/worker.py` runs them there, with the
versions that the peer asks for. hasten's graphs are run by the same worker. All calibrate on the same texts.

Latencies are of texts of an exact length in tokens, and of test texts as they come, tokenizer included. hasten's
OpenVINO files are opened as its runtime opens them, the peers' as OpenVINO's guide to latency says. All graphs'
processes are launched several times, and in each launch asked in a random order: one graph in two processes differs by
more than its requests do. What a peer cannot do is a result too. Interrupted and started again, it goes on. Nothing
else may run beside it.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.errors import HastenError
from hasten.files import file_sha256
from hasten.measurement import this_host
from hasten.openvino_runtime import cpu_settings
from hasten.profiling import ProfileOptions
from hasten.variant import Variant, building, copy_configuration, open_variant
from hasten.variant_maker import QUANTIZE_TEXTS
from hasten.workload import Workload, random_rows, read_texts, read_workload, some_rows
from hasten.workshop import Workshop, make_key
from peers import client, measuring
from peers.environments import PEERS, Row, built
from peers.measuring import (
    AS_THEY_COME,
    Reference,
    accuracy,
    latencies,
    p50,
    quality,
    reference,
    texts_of,
    times_faster,
)
from peers.own import Own
from peers.tables import markdown
from provenance import save_result

LENGTHS_TOKENS = (16, 32, 64, 128, 256)
MIXED_TIMES = 5  # as many requests of them as of a length


def harness() -> list[str]:
    """Identity (hex) of what measures."""
    return [file_sha256(Path(module.__file__ or "")) for module in (client, measuring)] + [file_sha256(client.WORKER)]


STATIC, DYNAMIC = "onnx-int8", "onnx-int8-dynamic"


class Comparison:
    """One classifier's comparison, in one folder."""

    def __init__(self, source: Variant, data: dict[str, str], out: Path, options: ProfileOptions) -> None:
        self.source, self.options = source, options
        self.shop = Workshop(out)
        every = read_texts(data["train"])
        rows = some_rows(len(every), QUANTIZE_TEXTS, seed=options.seed)
        self.texts = [every[row] for row in rows]
        self.valid = read_workload(data["valid"], name="valid", labels=source.labels)
        self.test: Workload = read_workload(data["test"], name="test", labels=source.labels)

    def rows(self, peers: list[str], envs: Path) -> list[Row]:
        """All rows, hasten's first."""
        checkpoint, calibration = self._inputs()
        threads = self.options.resolved_threads
        print("building hasten's graphs", flush=True)
        own = Own(source=self.source, texts=self.texts, valid=self.valid, threads=threads, shop=self.shop)
        rows = own.rows()
        for peer in peers:
            print(f"building the graphs of {peer}", flush=True)
            rows += built(peer, checkpoint, calibration, envs, self._place())
        for row in rows:
            print(f"  {row.name}: {row.error or 'made'}", flush=True)
        return rows

    def _place(self) -> Path:
        """Folder of the peers' rows of this classifier and these texts."""
        place = self.shop.work / f"peers-{make_key(self.source.digest, self.texts)[:16]}"
        place.mkdir(exist_ok=True)
        return place

    def _inputs(self) -> tuple[Path, Path]:
        """A copy of the classifier, in which a peer may write, and the texts to calibrate on."""
        checkpoint, calibration = self._place() / "classifier", self._place() / "calibration.jsonl"
        with building(checkpoint) as draft:
            copy_configuration(self.source, draft)
            for name in ("model.safetensors", "variant.json"):
                shutil.copyfile(self.source.path / name, draft / name)
        calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.texts), encoding="utf-8")
        return checkpoint.absolute(), calibration.absolute()

    def judged(self, rows: list[Row]) -> tuple[list[dict[str, Any]], Reference]:
        """What each row is, with its quality or its error."""
        threads, parts = self.options.resolved_threads, (self.source.digest, self.test.digest, harness())
        expected: Reference = self.shop.cached(
            "pytorch", make_key(parts), Reference, lambda: reference(self.source, self.test, threads)
        )
        found: list[dict[str, Any]] = []
        for row in rows:
            about = {key: value for key, value in asdict(row).items() if key not in {"folder", "python"}}
            about |= {"precision": row.precision, "size_bytes": row.size_bytes}
            try:
                if row.error is None:
                    key = make_key(parts, row.name, row.digest, row.versions, threads)
                    about |= self.shop.cached(
                        "quality", key, dict[str, Any],
                        lambda row=row: quality(row, self.source, self.test, expected, threads),
                    )  # fmt: skip
                    print(f"  {row.name}: accuracy {about['accuracy']['value']:.4f}", flush=True)
            except HastenError as error:
                about["error"] = str(error)
                print(f"  {row.name}: {error}", flush=True)
            found.append(about)
        return found, expected

    def timed(self, rows: list[Row], launches: int) -> list[dict[str, Any]]:
        """Medians and ratios by length, over several launches of all rows."""
        lengths = [tokens for tokens in LENGTHS_TOKENS if tokens <= self.source.manifest.max_tokens]
        distinct = {tokens: texts_of(self.source, self.test.texts, tokens) for tokens in lengths}
        distinct[AS_THEY_COME] = [self.test.texts[row] for row in random_rows(len(self.test), len(self.test), seed=0)]
        requests = dict.fromkeys(lengths, self.options.samples) | {AS_THEY_COME: MIXED_TIMES * self.options.samples}
        threads = self.options.resolved_threads
        ran = [(r.name, r.digest, r.versions, cpu_settings(threads=threads, precision=r.precision)) for r in rows]
        samples: dict[int, dict[str, list[list[float]]]] = {
            tokens: {row.name: [] for row in rows} for tokens in distinct
        }
        for launch in range(launches):
            texts = {
                tokens: [found[(launch * requests[tokens] + at) % len(found)] for at in range(requests[tokens])]
                for tokens, found in distinct.items()
            }
            key = make_key(ran, list(texts.values()), asdict(self.options), asdict(this_host()), harness(), launch)
            taken: dict[int, dict[str, list[float]]] = self.shop.cached(
                f"launch-{launch}", key, dict[int, dict[str, list[float]]],
                lambda texts=texts, launch=launch: latencies(rows, self.source, texts, self.options, launch),
            )  # fmt: skip
            print(f"  launch {launch + 1} of {launches}", flush=True)
            for tokens, by_row in taken.items():
                for name, times_ms in by_row.items():
                    samples[tokens][name].append(times_ms)
        return [self._summary(rows, tokens, len(distinct[tokens]), samples[tokens]) for tokens in distinct]

    def _summary(
        self, rows: list[Row], tokens: int, distinct: int, samples: dict[str, list[list[float]]]
    ) -> dict[str, Any]:
        ours, peers = ([row for row in rows if (row.peer == "hasten") == own] for own in (True, False))
        faster = {
            mine.name: times_faster(mine.name, [p.name for p in peers if p.weights == mine.weights], samples)
            for mine in ours
        }
        own = times_faster(STATIC, [DYNAMIC], samples)[DYNAMIC]
        medians = {name: p50(times_ms) for name, times_ms in samples.items()}
        print(f"  {tokens} tokens:", {name: median["value"] for name, median in medians.items()}, flush=True)
        return {
            "tokens": tokens,
            "distinct_texts": distinct,
            "p50_ms": medians,
            "times_faster": faster,
            "static_to_dynamic": own,
        }

    def result(self, peers: list[str], envs: Path, launches: int) -> dict[str, Any]:
        """Builds, judges, measures."""
        rows = self.rows(peers, envs)
        judged, expected = self.judged(rows)
        failed = {about["name"] for about in judged if about["error"] is not None}
        running = [row for row in rows if row.name not in failed]
        latency = self.timed(running, launches)
        return {
            "model": self.source.name, "architecture": self.source.manifest.architecture,
            "parameters": self.source.manifest.parameters.total, "threads": self.options.resolved_threads,
            "launches": launches, "requests": self.options.samples,
            "requests_as_they_come": MIXED_TIMES * self.options.samples, "calibration_texts": len(self.texts),
            "test_rows": len(self.test),
            "pytorch_accuracy": accuracy(expected.answers, self.test), "rows": judged, "latency": latency,
        }  # fmt: skip


def main(  # noqa: PLR0913, PLR0917 (a parameter for each option of the command line)
    variant: Path, train: Annotated[str, typer.Option()], valid: Annotated[str, typer.Option()],
    test: Annotated[str, typer.Option()], envs: Path = Path("peer-envs"), out: Path = Path("against-peers"),
    launches: int = 8,
    requests: int = 12, threads: int | None = None, only: str = ",".join(PEERS), name: str | None = None,
) -> None:  # fmt: skip
    """Makes all graphs, measures, and saves `results/<name>.json` and `.md`."""
    logging.disable(logging.WARNING)
    peers = only.split(",")
    if unknown := set(peers) - set(PEERS):
        sys.exit(f"--only: no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    try:
        source = open_variant(variant)
        if source.manifest.format != "torch":
            sys.exit(f"{variant}: a variant in {source.manifest.format}; give the torch variant that teachers.py made")
        data, options = (
            {"train": train, "valid": valid, "test": test},
            ProfileOptions(samples=requests, threads=threads),
        )
        comparison = Comparison(source, data, out.absolute(), options)
        envs.mkdir(parents=True, exist_ok=True)
        with comparison.shop.held():
            result = comparison.result(peers, envs.absolute(), launches)
    except HastenError as error:
        sys.exit(str(error))
    path = save_result(name or f"peers_{source.name}", result)
    path.with_suffix(".md").write_text(markdown(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    typer.run(main)
