"""An app round a fake runtime, clients for it in process and over a socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette

from hasten.connection import Connection
from hasten.errors import DataError
from hasten.runtime import FakeRuntime, Logits, softmax
from hasten.serve_options import ServeOptions
from hasten.served import Loaded
from hasten.server import create_app
from hasten.tokenization import Encoding

DIGEST = "d" * 64
OPTIONS = ServeOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedRuntime:
    """Answers as FakeRuntime does, once the gate is open; fails on a text `bad`, answers NaN on `nan`."""

    labels: tuple[str, ...] = ("negative", "positive")
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    batches: list[list[str]] = field(default_factory=list)
    compiles_shapes: bool = False

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        if "unreadable" in texts:
            raise DataError("a text is not valid Unicode")
        return FakeRuntime().encode(texts)

    def encode_plain(self, texts: Sequence[str]) -> list[Encoding] | None:
        return FakeRuntime().encode_plain(texts)

    def infer(self, encodings: Sequence[Encoding]) -> Logits:
        texts = [bytes(encoding.ids).decode() for encoding in encodings]
        if not texts[0].startswith("a"):  # warm-up texts pass
            self.batches.append(texts)
            self.entered.set()
            assert self.gate.wait(5)
        if "bad" in texts:
            raise ValueError("cannot compute this")
        logits = FakeRuntime(labels=self.labels).infer(encodings)
        logits[[text == "nan" for text in texts]] = np.nan
        return logits

    async def busy(self) -> None:
        while not self.entered.is_set():
            await asyncio.sleep(0.001)


def make_app(runtime: Any = None, options: ServeOptions = OPTIONS, *, batch_invariant: bool = True) -> Starlette:
    return create_app(Loaded(
        runtime=runtime or FakeRuntime(), name="onnx-fp32", digest=DIGEST, batch_invariant=batch_invariant,
        max_tokens=512,
    ), options)  # fmt: skip


@asynccontextmanager
async def client_of(app: Starlette) -> AsyncGenerator[httpx.AsyncClient]:
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        yield client


def visit(
    script: Callable[[httpx.AsyncClient], Awaitable[Any]],
    runtime: Any = None,
    options: ServeOptions = OPTIONS,
    *,
    batch_invariant: bool = True,
) -> Any:
    """Runs a script of requests against a fresh app; a hang becomes a failure."""

    async def session() -> Any:
        app = make_app(runtime, options, batch_invariant=batch_invariant)
        async with asyncio.timeout(10), client_of(app) as client:
            return await script(client)

    return asyncio.run(session())


def post(body: Any, path: str = "/predict", **context: Any) -> httpx.Response:
    """One POST; bytes go as they are, anything else as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return visit(lambda client: client.post(path, content=content), **context)


def expected(text: str, labels: Sequence[str] = ("negative", "positive")) -> list[dict[str, Any]]:
    runtime = FakeRuntime(labels=tuple(labels))
    scores = softmax(runtime.infer(runtime.encode([text])))[0]
    return sorted(
        (
            {"label": label, "score": pytest.approx(float(score), abs=1e-6)}
            for label, score in zip(labels, scores, strict=True)
        ),
        key=lambda element: -element["score"].expected,
    )


@contextmanager
def live(app: Starlette) -> Generator[str]:
    """A real server on a free loopback port."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, loop="uvloop", http=Connection, ws="none", lifespan="on", log_config=None)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(10)


def open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate
