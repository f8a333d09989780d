from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import OPTIONS, client_of, expected

from hasten import served
from hasten.errors import ArtifactError, UsageError
from hasten.processes import serve
from hasten.runtime import FakeRuntime, Logits
from hasten.server import open_app
from hasten.tokenization import Encoding
from hasten.variant import Manifest, Parameters, StepRecord, Variant, open_variant, seal


def make_folder(folder: Path, *, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(weights)
    seal(folder, Manifest(
        schema="hasten.variant/1", name="onnx-int8", task="single_label_classification", format="onnx",
        precision="int8", architecture="bert", labels=["negative", "positive"], max_tokens=64,
        parameters=Parameters(embedding=1, encoder=1, head=1), batch_invariant=False,
        step=StepRecord(name="quantize", parent=None),
    ))  # fmt: skip
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Replaces what needs a real model; lists what was called, for which variant, with how many threads."""
    calls: list[tuple[str, str, int]] = []

    def open_runtime(variant: Variant, *, threads: int, workers: int) -> FakeRuntime:
        calls.append(("open", variant.name, threads * workers))
        return FakeRuntime(max_tokens=64)

    def replay_golden(variant: Variant, *, threads: int) -> float:
        calls.append(("replay", variant.name, threads))
        return 0.0

    monkeypatch.setattr(served, "open_runtime", open_runtime)
    monkeypatch.setattr(served, "replay_golden", replay_golden)
    monkeypatch.setattr(served, "other_machine", lambda variant: [])
    return calls


def test_a_folder_is_checked_replayed_and_loaded(tmp_path: Path, loads: list[tuple[str, str, int]]) -> None:
    async def script() -> httpx.Response:
        async with client_of(open_app(make_folder(tmp_path / "v"), replace(OPTIONS, threads=3))) as client:
            return await client.get("/health")

    assert asyncio.run(script()).json()["name"] == "onnx-int8"
    assert loads == [("replay", "onnx-int8", 3), ("open", "onnx-int8", 3)]
    (tmp_path / "v" / "model.onnx").write_bytes(b"others")
    with pytest.raises(ArtifactError, match="sha256"):
        open_app(tmp_path / "v", OPTIONS)


def test_serve_refuses_an_address_it_cannot_have(tmp_path: Path, loads: list[Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port}"):
            serve(tmp_path, replace(OPTIONS, port=port))
    with pytest.raises(UsageError, match="port 70000"):
        serve(tmp_path, replace(OPTIONS, port=70000))
    assert loads == []


def test_serve_answers_until_it_is_told_to_stop(
    tmp_path: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    folder, replies = make_folder(tmp_path / "v"), list[httpx.Response]()
    startup = uvicorn.Server.startup

    async def ask_then_stop(self: uvicorn.Server, sockets: Any = None) -> None:
        await startup(self, sockets)
        host, port = sockets[0].getsockname()

        def ask() -> None:
            replies.append(httpx.post(f"http://{host}:{port}/predict", json={"inputs": "hello"}, timeout=10))

        self.asked = asyncio.create_task(asyncio.to_thread(ask))
        self.asked.add_done_callback(lambda _: setattr(self, "should_exit", True))

    monkeypatch.setattr(uvicorn.Server, "startup", ask_then_stop)
    serve(folder, replace(OPTIONS, port=0))
    assert replies[0].json() == expected("hello")
    assert "server" not in replies[0].headers


def test_a_hang_up_signal_reloads_the_folder(
    tmp_path: Path, loads: list[tuple[str, str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    folder, startup, digests = make_folder(tmp_path / "v"), uvicorn.Server.startup, list[str]()
    with_others = make_folder(tmp_path / "other", weights=b"other weights")

    async def hang_up_then_stop(self: uvicorn.Server, sockets: Any = None) -> None:
        await startup(self, sockets)
        host, port = sockets[0].getsockname()

        async def digest() -> str:
            async with httpx.AsyncClient() as client:
                return (await client.get(f"http://{host}:{port}/health")).json()["digest"]

        async def script() -> None:
            digests.append(await digest())
            folder.rename(tmp_path / "old")
            with_others.rename(folder)
            os.kill(os.getpid(), signal.SIGHUP)
            async with asyncio.timeout(10):
                while await digest() == digests[0]:
                    await asyncio.sleep(0.01)
            digests.append(await digest())

        self.scripted = asyncio.create_task(script())
        self.scripted.add_done_callback(lambda _: setattr(self, "should_exit", True))

    monkeypatch.setattr(uvicorn.Server, "startup", hang_up_then_stop)
    serve(folder, replace(OPTIONS, port=0))
    assert digests == [open_variant(tmp_path / "old").digest, open_variant(folder).digest]
    assert [call for call, *_ in loads] == ["replay", "open"] * 2


def test_serve_says_so_when_the_warm_up_fails(
    tmp_path: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(FakeRuntime):
        def infer(self, encodings: Sequence[Encoding]) -> Logits:
            raise RuntimeError("no kernel for this")

    monkeypatch.setattr(served, "open_runtime", lambda variant, threads, workers: Broken())
    with pytest.raises(ArtifactError, match="did not start"):
        serve(make_folder(tmp_path / "v"), replace(OPTIONS, port=0))


def test_serving_needs_no_heavy_library() -> None:
    code = (
        "import sys, hasten.processes, uvicorn\n"
        "heavy = {'torch', 'transformers', 'onnx', 'datasets', 'ray', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("p99_ms", "says"), [(1e-6, "all will be refused"), (60_000.0, "")])
def test_a_deadline_that_cannot_be_kept_is_warned_of(
    p99_ms: float, says: str, tmp_path: Path, loads: list[tuple[str, str, int]], caplog: pytest.LogCaptureFixture
) -> None:
    async def script() -> None:
        async with client_of(open_app(make_folder(tmp_path / "v"), replace(OPTIONS, p99_ms=p99_ms))):
            pass

    asyncio.run(script())
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (says in warned[0]) if says else not warned
