"""Several processes on one port, from the command line: real ones, killed, told to reload, told to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil
import pytest

from conftest import make_checkpoint
from hasten.checkpoint import import_checkpoint
from hasten.onnx_export import export
from hasten.variant import Manifest, Parameters, StepRecord, Variant, seal

LIMIT_S = 60
PROCESSES = 2


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> tuple[Variant, Variant]:
    """Two variants that give different logits."""
    place = tmp_path_factory.mktemp("variants")
    first, second = (
        export(import_checkpoint(str(make_checkpoint(place / f"raw{seed}", seed=seed)), place / f"torch{seed}",
               name=f"torch{seed}"), place / f"onnx{seed}", name=f"onnx{seed}")
        for seed in (0, 1)
    )  # fmt: skip
    return first, second


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A running server.

    Attributes:
        process: The one that watches the others.
        url: Where they listen.
        link: What they serve, a link to a folder.
        log: What they said.
    """

    process: psutil.Popen
    url: str
    link: Path
    log: Path

    def ask(self) -> str:
        """Asks on a connection of its own; the artifact that answered."""
        reply = httpx.post(f"{self.url}/predict", json={"inputs": "the food was great"}, timeout=10)
        assert reply.status_code == 200, reply.text
        return reply.headers["x-hasten-artifact"]

    def metric(self, series: str) -> float | None:
        """The value of a series, as whichever process was asked tells it."""
        found = re.search(rf"^{re.escape(series)} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        return None if found is None else float(found[1])

    def those_serving(self) -> list[psutil.Process]:
        """Processes that answer, or are about to."""
        found = list[psutil.Process]()
        for one in self.process.children():
            with suppress(psutil.NoSuchProcess):  # or a zombie
                if "spawn_main" in " ".join(one.cmdline()):
                    found.append(one)
        return found

    def point(self, folder: Path) -> None:
        fresh = self.link.with_name("fresh")
        fresh.symlink_to(folder)
        fresh.replace(self.link)

    def said(self, words: str) -> bool:
        return words in self.log.read_text(encoding="utf-8")


def until(true: Callable[[], bool]) -> None:
    limit_s = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < limit_s
        time.sleep(0.05)


def command(folder: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "hasten",
        "serve",
        str(folder),
        "--processes",
        str(PROCESSES),
        "--threads",
        "1",
        *flags,
    ]


@contextmanager
def site_of(variant: Variant, place: Path, *flags: str) -> Generator[Site]:
    link, log = place / "served", place / "log"
    link.symlink_to(variant.path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("wb") as stream:
        process = psutil.Popen([*command(link, "--port", str(port), *flags)], stderr=stream, env=environment(place))
    site = Site(process=process, url=f"http://127.0.0.1:{port}", link=link, log=log)
    try:
        until(lambda: site.said("serving on http://"))
        yield site
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def environment(place: Path) -> dict[str, str]:
    scratch = place / "scratch"
    scratch.mkdir(exist_ok=True)
    return {**os.environ, "TMPDIR": str(scratch)}


def test_one_view_of_the_metrics_and_a_clean_end(variants: tuple[Variant, Variant], tmp_path: Path) -> None:
    with site_of(variants[0], tmp_path, "--log-json") as site:
        assert {site.ask() for _ in range(20)} == {variants[0].digest}
        answered = [site.metric('hasten_requests_total{status="200"}') for _ in range(10)]
        assert answered == [20] * 10  # whoever is asked
        assert site.metric("hasten_total_seconds_count") == 20
        assert site.metric(f'hasten_artifact_info{{digest="{variants[0].digest}",name="onnx0"}}') == 1
        serving = site.those_serving()
        assert len(serving) == PROCESSES
    assert site.process.returncode == 0
    assert not any(one.is_running() for one in serving)
    assert not list((tmp_path / "scratch").iterdir())
    lines = [json.loads(line) for line in site.log.read_text(encoding="utf-8").splitlines()]
    assert [line["message"] for line in lines if "serving on" in line["message"]] == [f"serving on {site.url}"]


def test_a_killed_process_is_replaced_and_nothing_else_is_lost(
    variants: tuple[Variant, Variant], tmp_path: Path
) -> None:
    with site_of(variants[0], tmp_path) as site:
        before = site.those_serving()
        for _ in range(10):
            site.ask()
        before[0].kill()
        for _ in range(20):
            assert site.ask() == variants[0].digest
        until(lambda: site.metric('hasten_artifact_info{digest="' + variants[0].digest + '",name="onnx0"}') == 1)
        until(lambda: len({*site.those_serving()} - {*before}) == 1)
        assert site.metric('hasten_requests_total{status="200"}') == 30  # what the dead one counted is still there
        assert site.said(f"process {before[0].pid} ended")


def test_without_the_one_that_watches_nobody_serves_on(variants: tuple[Variant, Variant], tmp_path: Path) -> None:
    with site_of(variants[0], tmp_path) as site:
        serving = site.those_serving()
        site.process.kill()
        until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in serving))
        assert site.said("the process that watches this one ended")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{site.url}/health")


def test_a_reload_that_comes_while_a_process_starts_reaches_it(
    variants: tuple[Variant, Variant], tmp_path: Path
) -> None:
    old, new = variants
    with site_of(old, tmp_path) as site:
        before = {one.pid for one in site.those_serving()}
        site.those_serving()[0].kill()
        until(lambda: len({one.pid for one in site.those_serving()} - before) == 1)  # it has begun, and serves nothing
        site.point(new.path)
        site.process.send_signal(signal.SIGHUP)
        info = 'hasten_artifact_info{digest="%s",name="onnx%d"}'
        until(lambda: site.metric(info % (new.digest, 1)) == 1 and not site.metric(info % (old.digest, 0)))
        assert {site.ask() for _ in range(20)} == {new.digest}


def test_a_reload_reaches_every_process_and_closes_no_connection(
    variants: tuple[Variant, Variant], tmp_path: Path
) -> None:
    old, new = variants
    with site_of(old, tmp_path) as site, httpx.Client(base_url=site.url) as kept:
        before = site.those_serving()
        asked = {"json": {"inputs": "the food was great"}}
        stream = kept.post("/predict", **asked).extensions["network_stream"]
        site.point(new.path)
        site.process.send_signal(signal.SIGHUP)
        until(lambda: site.metric('hasten_reloads_total{outcome="done"}') == PROCESSES)
        after = kept.post("/predict", **asked)
        assert (after.extensions["network_stream"], after.headers["x-hasten-artifact"]) == (stream, new.digest)
        assert {site.ask() for _ in range(20)} == {new.digest}
        assert site.metric(f'hasten_artifact_info{{digest="{old.digest}",name="onnx0"}}') == 0
        assert site.those_serving() == before


def nothing(_variant: Variant, folder: Path) -> Path:
    return folder


def too_long(variant: Variant, folder: Path) -> Path:
    """A variant that opens and answers its golden texts, and fails at the longest texts, in the warm-up."""
    shutil.copytree(variant.path, folder)
    seal(folder, replace(variant.manifest, max_tokens=8 * variant.manifest.max_tokens))
    return folder


@pytest.mark.parametrize("make", [nothing, too_long])
def test_what_cannot_be_loaded_takes_nobodys_place(
    make: Callable[[Variant, Path], Path], variants: tuple[Variant, Variant], tmp_path: Path
) -> None:
    with site_of(variants[0], tmp_path) as site:
        site.point(make(variants[0], tmp_path / "other"))
        site.process.send_signal(signal.SIGHUP)
        until(lambda: site.metric('hasten_reloads_total{outcome="refused"}') == PROCESSES)
        site.those_serving()[0].kill()
        until(lambda: site.log.read_text(encoding="utf-8").count("another takes its place") >= 2)  # it cannot start
        assert {site.ask() for _ in range(10)} == {variants[0].digest}
        site.point(variants[0].path)
        until(lambda: "at the same time" in site.log.read_text(encoding="utf-8").splitlines()[-1])  # it could be opened
        assert len(site.those_serving()) == PROCESSES


def sealed(folder: Path) -> Path:
    """A variant whose hashes are right and whose graph is none."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"no graph")
    seal(folder, Manifest(
        schema="hasten.variant/1", name="broken", task="single_label_classification", format="onnx", precision="fp32",
        architecture="bert", labels=["no", "yes"], max_tokens=64, batch_invariant=False,
        parameters=Parameters(embedding=1, encoder=1, head=1), step=StepRecord(name="export", parent=None),
    ))  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("make", "flags", "status", "words"),
    [
        (sealed, (), 1, "a process|did not start"),
        (lambda folder: folder, (), 1, "no variant|not a folder|does not exist|missing"),
        (sealed, ("--processes", "0"), 2, "--processes is at least 1, not 0"),
    ],
    ids=["a graph that cannot be loaded", "no folder", "no process"],
)
def test_what_cannot_start_ends_with_an_error(
    make: Callable[[Path], Path], flags: tuple[str, ...], status: int, words: str, tmp_path: Path
) -> None:
    line = command(make(tmp_path / "v"), "--port", "0", *flags)
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=environment(tmp_path))
    assert done.returncode == status, done.stderr
    assert re.search(words, done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "scratch").iterdir())
