"""Deadlines of HTTP requests: read, refused before the work, and counted from when the request was there."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import httpx
import pytest
from serving import DIGEST, live, make_app, post, visit

from hasten.calls import READ_S
from hasten.connection import Round
from hasten.runtime import FakeRuntime, Logits
from hasten.serve_options import ServeOptions
from hasten.served import AT_ONCE_ON_ONE_CORE, TOKENIZING_YIELDS, YIELDING
from hasten.server import TOKENIZERS
from hasten.tokenization import Encoding

LONG = "x" * (AT_ONCE_ON_ONE_CORE + 1)  # not tokenized on the event loop


@pytest.mark.parametrize("value", ["0", "-5", "nan", "inf", "soon", ""])
def test_a_deadline_without_meaning_is_a_clear_error(value: str) -> None:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/predict", json={"inputs": "a"}, headers={"x-hasten-deadline-ms": value})

    reply = visit(ask)
    assert reply.status_code == 422
    assert "x-hasten-deadline-ms is a number of milliseconds above 0" in reply.json()["error"]


def test_a_deadline_out_of_reach_is_refused_and_counted() -> None:
    async def ask(client: httpx.AsyncClient) -> tuple[httpx.Response, str]:
        reply = await client.post("/predict", json={"inputs": "a"}, headers={"x-hasten-deadline-ms": "0.000001"})
        return reply, (await client.get("/metrics")).text

    reply, metrics = visit(ask)
    assert (reply.status_code, reply.json()["error_type"]) == (429, "overloaded")
    assert int(reply.headers["retry-after"]) >= 1
    assert 'hasten_refusals_total{reason="late"} 1.0' in metrics


def test_what_is_refused_for_lack_of_time_is_not_even_parsed() -> None:
    async def ask(client: httpx.AsyncClient) -> list[int]:
        return [
            (await client.post("/predict", content=b"{", headers={"x-hasten-deadline-ms": text})).status_code
            for text in ("0.000001", "5000")
        ]

    assert visit(ask) == [429, 400]


def test_a_refusal_says_who_refused_whom_and_only_questions_are_refused() -> None:
    headers = {"x-hasten-deadline-ms": "0.000001", "x-request-id": "mine"}

    async def ask(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        refused = await client.post("/v2/models/onnx-fp32/infer", content=b"{", headers=headers)
        return refused, await client.post("/nowhere", content=b"{", headers=headers)

    refused, unknown = visit(ask)
    assert (refused.status_code, unknown.status_code) == (429, 404)
    assert (refused.headers["x-request-id"], refused.headers["x-hasten-artifact"]) == ("mine", DIGEST)
    assert refused.headers["content-type"] == "application/json"
    assert int(refused.headers["content-length"]) == len(refused.content)


def test_a_connection_refuses_the_late_itself_and_goes_on() -> None:
    late, fine = {"x-hasten-deadline-ms": "0.000001", "x-request-id": "mine"}, {"inputs": "a"}
    with live(make_app()) as url, httpx.Client(base_url=url) as client:
        ports = set[int]()

        def ask(headers: dict[str, str]) -> httpx.Response:
            with client.stream("POST", "/predict", json=fine, headers=headers) as reply:
                ports.add(reply.extensions["network_stream"].get_extra_info("client_addr")[1])
                reply.read()
            return reply

        replies = [ask(headers) for headers in (late, {}, late, late, {})]
        last = ask({**late, "connection": "close"})
        metrics = httpx.get(f"{url}/metrics").text
    assert [reply.status_code for reply in (*replies, last)] == [429, 200, 429, 429, 200, 429]
    refused = replies[0]
    assert refused.json()["error_type"] == "overloaded"
    assert (refused.headers["x-request-id"], refused.headers["x-hasten-artifact"]) == ("mine", DIGEST)
    assert refused.headers["content-type"] == "application/json"
    assert int(refused.headers["retry-after"]) >= 1
    assert len(ports) == 1
    assert 'hasten_requests_total{status="429"} 4.0' in metrics
    assert 'hasten_refusals_total{reason="late"} 4.0' in metrics


@pytest.mark.parametrize(("waited_s", "status"), [(0.0, 200), (1.0, 429)])
def test_what_waited_for_the_loop_has_waited_for_its_answer(waited_s: float, status: int) -> None:
    async def script() -> None:
        async def receive() -> dict[str, Any]:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        app = make_app(options=ServeOptions(p99_ms=500))
        messages, sent = [{"type": "http.request", "body": b'{"inputs": "a"}'}], list[Any]()
        async with app.router.lifespan_context(app):
            read_s = perf_counter() - waited_s
            scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "state": {READ_S: read_s}}
            await app(scope, receive, send)
        assert sent[0]["status"] == status

    asyncio.run(script())


def test_what_is_read_in_one_round_of_the_loop_was_there_when_it_began() -> None:
    async def script() -> None:
        this_round = Round(asyncio.get_running_loop())
        first = this_round.began_s()
        assert this_round.began_s() == first
        await asyncio.sleep(0.001)
        assert this_round.began_s() > first

    asyncio.run(script())


@pytest.mark.skipif(sys.platform != "linux", reason="priorities belong to threads on Linux only")
def test_inference_yields_to_the_event_loop_and_tokenizing_less() -> None:
    class Watched(FakeRuntime):
        def encode(self, texts: Sequence[str]) -> list[Encoding]:
            found["tokenizing"] = priority()
            return super().encode(texts)

        def infer(self, encodings: Sequence[Encoding]) -> Logits:
            found["inference"] = priority()
            return super().infer(encodings)

    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    found, before = dict[str, int](), priority()
    assert post({"inputs": LONG}, runtime=Watched()).status_code == 200
    assert found == {"tokenizing": min(19, before + TOKENIZING_YIELDS), "inference": min(19, before + YIELDING)}
    assert priority() == before


def test_a_text_that_cannot_be_tokenized_in_time_is_refused_before_the_work() -> None:
    class Watched(FakeRuntime):
        def encode(self, texts: Sequence[str]) -> list[Encoding]:
            asked.extend(texts)
            return super().encode(texts)

    asked, long = list[str](), "a" * 200_000

    async def script(client: httpx.AsyncClient) -> list[int]:
        asked.clear()
        headers = [{"x-hasten-deadline-ms": "50"}, {"x-hasten-deadline-ms": "5000"}, {}]
        posts = [await client.post("/predict", json={"inputs": long}, headers=each) for each in headers]
        return [reply.status_code for reply in posts]

    assert visit(script, Watched()) == [429, 200, 200]
    assert asked == [long, long]


def test_a_text_whose_deadline_passes_before_its_turn_is_not_tokenized() -> None:
    class Slow(FakeRuntime):
        def encode(self, texts: Sequence[str]) -> list[Encoding]:
            asked.extend(texts)
            if texts[0].startswith("slow"):
                assert gate.wait(5)
            return super().encode(texts)

    asked, gate, slow = list[str](), threading.Event(), "slow" + LONG

    async def script(client: httpx.AsyncClient) -> list[int]:
        first = [asyncio.create_task(client.post("/predict", json={"inputs": slow})) for _ in range(TOKENIZERS)]
        while asked.count(slow) < TOKENIZERS:
            await asyncio.sleep(0.001)
        headers = {"x-hasten-deadline-ms": "100"}
        late = asyncio.create_task(client.post("/predict", json={"inputs": LONG}, headers=headers))
        await asyncio.sleep(0.2)
        gate.set()
        return [(await each).status_code for each in (*first, late)]

    assert visit(script, Slow()) == [200] * TOKENIZERS + [429]
    assert LONG not in asked


@pytest.mark.parametrize("path", ["/predict", "/predict?a=b"])
def test_a_body_that_takes_its_time_takes_nothing_of_the_servers(path: str) -> None:
    body = b'{"inputs": "a"}'
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-hasten-deadline-ms: 300\r\ncontent-length: {len(body)}\r\n\r\n"
    with live(make_app()) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 10) as client:
        client.sendall(head.encode())
        time.sleep(0.5)
        client.sendall(body)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
