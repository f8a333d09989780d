from __future__ import annotations

import asyncio
import json
import math
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from hasten import server
from hasten.errors import ArtifactError, DataError, UsageError
from hasten.runtime import FakeRuntime, Logits, softmax
from hasten.server import ServeOptions, create_app, open_app, serve
from hasten.tokenization import Encoding
from hasten.variant import Manifest, Parameters, StepRecord, Variant, seal

DIGEST = "d" * 64
OPTIONS = ServeOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedRuntime:
    """Answers as FakeRuntime does, once the gate is open; fails on a text `bad`, answers NaN on `nan`."""

    labels: tuple[str, ...] = ("negative", "positive")
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    batches: list[list[str]] = field(default_factory=list)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        if "unreadable" in texts:
            raise DataError("a text is not valid Unicode")
        return FakeRuntime().encode(texts)

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
    return create_app(
        runtime or FakeRuntime(), name="onnx-fp32", digest=DIGEST, batch_invariant=batch_invariant, max_tokens=512,
        options=options,
    )  # fmt: skip


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
    config = uvicorn.Config(app, loop="uvloop", http="httptools", ws="none", lifespan="on", log_config=None)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(10)


def test_one_text_gives_labels_with_scores_best_first() -> None:
    reply = post({"inputs": "a fine day"})
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == expected("a fine day")
    assert sum(element["score"] for element in reply.json()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("inputs", [["a", "b", "c"], [["a"], ["b"], ["c"]], ["a", ["b"], "c"]])
def test_a_list_gives_a_list_in_its_order(inputs: list[Any]) -> None:
    assert post({"inputs": inputs}).json() == [expected("a"), expected("b"), expected("c")]


def test_a_reply_tells_its_timings_and_its_artifact() -> None:
    headers = post({"inputs": ["a", "b"]}).headers
    assert headers["x-hasten-artifact"] == DIGEST
    for stage in ("tokenize", "queue", "inference"):
        assert 0 <= float(headers[f"x-hasten-{stage}-ms"]) < 10_000


def test_raw_scores_are_the_logits() -> None:
    logits = FakeRuntime().infer(FakeRuntime().encode(["x"]))[0]
    wanted = sorted(map(float, logits), reverse=True)
    for extra in ({"raw_scores": True}, {"parameters": {"function_to_apply": "none"}}):
        assert [element["score"] for element in post({"inputs": "x", **extra}).json()] == pytest.approx(wanted)


def test_sigmoid_and_top_k() -> None:
    labels = ("a", "b", "c", "d")
    body = {"inputs": "x", "parameters": {"function_to_apply": "sigmoid", "top_k": 2}}
    reply = post(body, runtime=FakeRuntime(labels=labels)).json()
    logits = sorted(map(float, FakeRuntime(labels=labels).infer(FakeRuntime().encode(["x"]))[0]), reverse=True)
    wanted = [1 / (1 + math.exp(-logit)) for logit in logits[:2]]
    assert [element["score"] for element in reply] == pytest.approx(wanted)


def test_long_texts_are_truncated_unless_asked_not_to() -> None:
    long = "x" * 600
    assert post({"inputs": long}).json() == expected("x" * 512)
    assert post({"inputs": long, "truncate": True}).status_code == 200
    reply = post({"inputs": long, "truncate": False})
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    assert post({"inputs": "short", "truncate": False}).json() == expected("short")


def test_unknown_fields_are_ignored() -> None:
    body = {"inputs": "a", "options": {"wait_for_model": True}, "parameters": {"odd": 1}, "model": None}
    assert post(body).json() == expected("a")


SURROGATE = b'{"inputs": "a \\ud800 b"}'
HOSTILE = {
    b"": 400, b"{": 400, b"\xff\xfe": 400, b'{"inputs": NaN}': 400, b'{"inputs": "a"} x': 400, SURROGATE: 400,
    b'{"inputs": "\\ud800"}': 400, b'{"inputs": "\xed\xa0\x80"}': 400, b'{"inputs": "a", "x": Infinity}': 400,
    b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "inputs": "a"}': 400,
    b"[" * 100_000: 422, b'{"inputs": ' + b"[" * 100_000: 422, b"null": 422, b"[]": 422, b'"a"': 422, b"{}": 422,
    b'{"inputs": null}': 422, b'{"inputs": 1}': 422, b'{"inputs": {"a": "b"}}': 422, b'{"inputs": [null]}': 422,
    b'{"inputs": []}': 422, b'{"inputs": ""}': 422, b'{"inputs": ["a", ""]}': 422, b'{"inputs": [[]]}': 422,
    b'{"inputs": [["a", "b"]]}': 422, b'{"inputs": "a", "truncate": "yes"}': 422,
    b'{"inputs": "a", "parameters": {"top_k": 0}}': 422, b'{"inputs": "unreadable"}': 422,
}  # fmt: skip


def test_hostile_bodies_are_refused_with_a_reason() -> None:
    async def script(client: httpx.AsyncClient) -> None:
        for body, status in HOSTILE.items():
            reply = await client.post("/predict", content=body)
            assert reply.status_code == status, (body[:40], reply.text)
            assert reply.json()["error"]
            assert reply.json()["error_type"] in ("validation", "empty", "tokenizer")
            assert reply.headers["x-hasten-artifact"] == DIGEST
        assert (await client.post("/predict", json={"inputs": "still here"})).status_code == 200

    visit(script, runtime=GatedRuntime(gate=_open_gate()))


@pytest.mark.parametrize("text", ["a\0b", "\0", " ", "\ufeff", "\U0010ffff", "naïve 東京 😀", "\u202e", "a" * 5000])
def test_odd_texts_get_the_answer_they_get_alone(text: str) -> None:
    cut = text.encode()[:512].decode(errors="ignore")
    assert post({"inputs": text}).json() == expected(cut)


def test_no_body_makes_the_server_fail() -> None:
    values = st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["inputs", "truncate", "x"]), inner)
        ),
        max_leaves=6,
    )
    bodies = st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode())

    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        client = runner.run(stack.enter_async_context(client_of(make_app())))

        @settings(deadline=None)
        @given(bodies)
        def check(body: bytes) -> None:
            assert runner.run(client.post("/predict", content=body)).status_code in (200, 400, 422)

        check()
        runner.run(stack.aclose())


def _open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


def test_a_large_body_is_refused_by_the_bytes_that_come() -> None:
    sent = 0

    async def chunks() -> AsyncGenerator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b" " * 100

    async def script(client: httpx.AsyncClient) -> None:
        for content in (chunks(), b" " * 1001):
            reply = await client.post("/predict", content=content)
            assert (reply.status_code, reply.headers["connection"]) == (413, "close")
            assert "1000 bytes" in reply.json()["error"]
        body = json.dumps({"inputs": "a"}).encode()
        assert (await client.post("/predict", content=body.ljust(1000))).status_code == 200

    visit(script, options=replace(OPTIONS, max_body_bytes=1000))
    assert sent < 20


@pytest.mark.parametrize("options", [replace(OPTIONS, max_rows=3), replace(OPTIONS, max_queue=3)])
def test_too_many_texts_in_a_request_are_refused(options: ServeOptions) -> None:
    assert post({"inputs": ["a"] * 4}, options=options).status_code == 413
    assert post({"inputs": ["a"] * 3}, options=options).status_code == 200


def test_batched_answers_are_those_given_alone() -> None:
    texts = [f"text {'x' * (7 * number % 50)}" for number in range(20)]

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post("/predict", json={"inputs": text}) for text in texts))

    assert [reply.json() for reply in visit(script)] == [expected(text) for text in texts]


@pytest.mark.parametrize(("batch_invariant", "largest"), [(True, 4), (False, 1)])
def test_a_variant_that_is_not_batch_invariant_answers_one_by_one(batch_invariant: bool, largest: int) -> None:
    runtime = GatedRuntime(gate=_open_gate())
    reply = post({"inputs": ["t1", "t2", "t3", "t4"]}, runtime=runtime, batch_invariant=batch_invariant)
    assert reply.json() == [expected(text) for text in ("t1", "t2", "t3", "t4")]
    assert max(map(len, runtime.batches)) == largest


def ask(client: httpx.AsyncClient, inputs: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(client.post("/predict", json={"inputs": inputs}))


async def queue_holds(client: httpx.AsyncClient, rows: int) -> None:
    async with asyncio.timeout(5):
        while f"hasten_queue_rows {rows}.0" not in (await client.get("/metrics")).text:
            await asyncio.sleep(0)


def test_what_the_queue_cannot_hold_is_refused_at_once_and_whole() -> None:
    async def script(client: httpx.AsyncClient) -> None:
        tasks = [ask(client, "running")]
        await runtime.busy()
        tasks.append(ask(client, "waiting"))
        await queue_holds(client, 1)
        refused = await ask(client, ["x", "y"])
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error_type"] == "overloaded"
        tasks.append(ask(client, "fits"))
        await queue_holds(client, 2)
        assert (await ask(client, "z")).status_code == 429
        assert not runtime.gate.is_set()
        runtime.gate.set()
        assert [reply.status_code for reply in await asyncio.gather(*tasks)] == [200, 200, 200]
        assert runtime.batches == [["running"], ["waiting", "fits"]]
        metrics = (await client.get("/metrics")).text
        assert "hasten_refusals_total 2.0" in metrics
        assert 'hasten_requests_total{status="429"} 2.0' in metrics

    runtime = GatedRuntime()
    visit(script, runtime=runtime, options=replace(OPTIONS, max_queue=2))


def test_a_text_that_cannot_be_computed_fails_alone() -> None:
    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        first = ask(client, "first")
        await runtime.busy()
        tasks = []
        for count, text in enumerate(("one", "bad", "two", "nan"), start=1):
            tasks.append(ask(client, text))
            await queue_holds(client, count)
        runtime.gate.set()
        return [await first, *await asyncio.gather(*tasks)]

    runtime = GatedRuntime()
    replies = visit(script, runtime=runtime)
    assert [reply.status_code for reply in replies] == [200, 200, 500, 200, 500]
    assert replies[1].json() == expected("one")
    assert replies[3].json() == expected("two")
    assert replies[2].json()["error_type"] == "backend"
    assert "cannot compute" not in replies[2].text
    assert len(runtime.batches[1]) == 4


def test_the_row_of_a_client_that_left_is_not_computed() -> None:
    async def script() -> None:
        app = make_app(runtime)
        async with client_of(app) as client:
            first = ask(client, "first")
            await runtime.busy()
            left = asyncio.Event()
            sent: list[Any] = []
            messages = [{"type": "http.request", "body": b'{"inputs": "gone"}', "more_body": False}]

            async def receive() -> dict[str, Any]:
                if messages:
                    return messages.pop()
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b""}
            request = asyncio.create_task(app(scope, receive, send))
            await queue_holds(client, 1)
            left.set()
            await request
            assert sent[0]["status"] == 499
            assert "hasten_queue_rows 0.0" in (await client.get("/metrics")).text
            second = ask(client, "second")
            runtime.gate.set()
            assert [reply.status_code for reply in await asyncio.gather(first, second)] == [200, 200]

    runtime = GatedRuntime()
    asyncio.run(script())
    assert runtime.batches == [["first"], ["second"]]


def test_closing_finishes_what_was_admitted_and_refuses_the_rest() -> None:
    async def script() -> None:
        app = make_app(runtime)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.get("/health")).status_code == 503
            lifespan = app.router.lifespan_context(app)
            await lifespan.__aenter__()
            assert (await client.get("/health")).status_code == 200
            admitted = asyncio.create_task(client.post("/predict", json={"inputs": "first"}))
            await runtime.busy()
            closing = asyncio.create_task(lifespan.__aexit__(None, None, None))
            await asyncio.sleep(0)
            assert (await client.get("/health")).status_code == 503
            refused = await client.post("/predict", json={"inputs": "late"})
            assert (refused.status_code, refused.json()["error_type"]) == (503, "overloaded")
            runtime.gate.set()
            assert (await admitted).status_code == 200
            await closing
            assert (await client.post("/predict", json={"inputs": "late"})).status_code == 503
            assert (await client.get("/metrics")).status_code == 200

    runtime = GatedRuntime()
    asyncio.run(script())


def test_the_other_routes() -> None:
    async def script(client: httpx.AsyncClient) -> None:
        health = (await client.get("/health")).json()
        assert health == {"status": "ok", "name": "onnx-fp32", "digest": DIGEST}
        about = (await client.get("/")).json()
        assert about["labels"] == ["negative", "positive"]
        assert "POST /predict" in about["routes"]
        missing, wrong = await client.get("/nothing"), await client.get("/predict")
        assert (missing.status_code, missing.json()["error"]) == (404, "Not Found")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")

    visit(script)


def test_metrics_count_requests_stages_and_batches() -> None:
    async def script(client: httpx.AsyncClient) -> str:
        await client.post("/predict", json={"inputs": ["a", "b", "c"]})
        await client.post("/predict", content=b"{")
        return (await client.get("/metrics")).text

    text = visit(script)
    assert 'hasten_requests_total{status="200"} 1.0' in text
    assert 'hasten_requests_total{status="400"} 1.0' in text
    assert 'hasten_batch_rows_bucket{le="2.0"} 0.0' in text
    assert 'hasten_batch_rows_bucket{le="4.0"} 1.0' in text
    for stage, count in (("tokenize", 1), ("queue", 1), ("inference", 1), ("total", 2)):
        assert f"hasten_{stage}_seconds_count {count}.0" in text
        assert f'hasten_{stage}_seconds_bucket{{le="0.0001"}}' in text


def test_the_inference_client_of_the_hub_works_against_a_live_server(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with live(make_app()) as url:
        client = hub.InferenceClient(url, token="none")
        answer = client.text_classification("a fine day", top_k=1)
        both = client.text_classification("a fine day")
        reply = httpx.post(f"{url}/predict", json={"inputs": "a fine day"}, timeout=10)
        with pytest.raises(hub.errors.HfHubHTTPError, match="422"):
            client.text_classification("")
        hub.utils.close_session()
    wanted = expected("a fine day")
    assert [{"label": element.label, "score": element.score} for element in both] == wanted
    assert [element.label for element in answer] == [wanted[0]["label"]]
    assert reply.json() == wanted
    assert reply.headers["x-hasten-artifact"] == DIGEST


def test_a_live_server_drops_the_row_of_a_client_that_hangs_up() -> None:
    runtime = GatedRuntime()
    head = b"POST /predict HTTP/1.1\r\nHost: test\r\nContent-Length: 18\r\n\r\n"
    with live(make_app(runtime)) as url, httpx.Client(base_url=url, timeout=10) as client:

        def wait_for(line: str) -> None:
            for _ in range(1000):
                if line in client.get("/metrics").text:
                    return
            raise AssertionError(line)

        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address) as first, socket.create_connection(address) as second:
            first.sendall(head + b'{"inputs":"first"}')
            assert runtime.entered.wait(5)
            second.sendall(head + b'{"inputs": "gone"}')
            wait_for("hasten_queue_rows 1.0")
            second.close()
            wait_for('hasten_requests_total{status="499"} 1.0')
            runtime.gate.set()
            assert first.recv(1000).startswith(b"HTTP/1.1 200")
    assert runtime.batches == [["first"]]


def make_folder(folder: Path, *, batch_invariant: bool = False) -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"weights")
    seal(folder, Manifest(
        schema="hasten.variant/1", name="onnx-int8", task="single_label_classification", format="onnx",
        precision="int8", architecture="bert", labels=["negative", "positive"], max_tokens=64,
        parameters=Parameters(embedding=1, encoder=1, head=1), batch_invariant=batch_invariant,
        step=StepRecord(name="quantize", parent=None),
    ))  # fmt: skip
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Replaces what needs a real model; lists what was called, for which variant, with how many threads."""
    calls: list[tuple[str, str, int]] = []

    def open_runtime(variant: Variant, *, threads: int) -> FakeRuntime:
        calls.append(("open", variant.name, threads))
        return FakeRuntime(max_tokens=64)

    def replay_golden(variant: Variant, *, threads: int) -> float:
        calls.append(("replay", variant.name, threads))
        return 0.0

    monkeypatch.setattr(server, "open_runtime", open_runtime)
    monkeypatch.setattr(server, "replay_golden", replay_golden)
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


def test_serve_says_so_when_the_warm_up_fails(
    tmp_path: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(FakeRuntime):
        def infer(self, encodings: Sequence[Encoding]) -> Logits:
            raise RuntimeError("no kernel for this")

    monkeypatch.setattr(server, "open_runtime", lambda variant, threads: Broken())
    with pytest.raises(ArtifactError, match="did not start"):
        serve(make_folder(tmp_path / "v"), replace(OPTIONS, port=0))


def test_serving_needs_no_heavy_library() -> None:
    code = (
        "import sys, hasten.server, uvicorn\n"
        "heavy = {'torch', 'transformers', 'onnx', 'datasets', 'ray', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
