from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from typing import Any

import httpx
import pytest
from serving import OPTIONS, GatedRuntime, client_of, expected, live, make_app, open_gate, visit


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
        assert 'hasten_refusals_total{reason="queue full"} 2.0' in metrics
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
            assert (refused.status_code, refused.json()["error_type"]) == (503, "unhealthy")
            runtime.gate.set()
            assert (await admitted).status_code == 200
            await closing
            assert (await client.post("/predict", json={"inputs": "late"})).status_code == 503
            assert (await client.get("/metrics")).status_code == 200

    runtime = GatedRuntime()
    asyncio.run(script())


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


def test_what_waits_behind_the_request_of_a_client_that_left_ends_without_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime = GatedRuntime()
    asked = b'POST /predict HTTP/1.1\r\nHost: test\r\nContent-Length: 18\r\n\r\n{"inputs": "gone"}'
    with live(make_app(runtime)) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(3 * asked)
            assert runtime.entered.wait(5)
        runtime.gate.set()
        assert httpx.post(f"{url}/predict", json={"inputs": "later"}, timeout=10).status_code == 200
    assert ["later"] in runtime.batches
    assert "Exception" not in caplog.text


def test_a_request_keeps_its_id_and_the_log_names_it(caplog: pytest.LogCaptureFixture) -> None:
    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        bodies = [({"inputs": "a"}, "mine"), ({"inputs": "bad"}, "broken"), ({}, "x" * 999), ({"inputs": "a"}, "")]
        return [await client.post("/predict", json=body, headers={"x-request-id": name}) for body, name in bodies]

    answered, failed, refused, unnamed = visit(script, runtime=GatedRuntime(gate=open_gate()))
    assert (answered.status_code, answered.headers["x-request-id"]) == (200, "mine")
    assert (failed.status_code, failed.headers["x-request-id"]) == (500, "broken")
    assert "request broken: inference failed" in caplog.text
    assert (refused.status_code, refused.headers["x-request-id"]) == (422, "x" * 128)
    assert len(unnamed.headers["x-request-id"]) == 16
