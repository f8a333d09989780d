"""What goes from a connection to its endpoint, past ASGI, looks the same to a client."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from time import perf_counter
from typing import Any, cast

import httpx
import pytest
from serving import OPTIONS, GatedRuntime, live, make_app

from hasten import connection, server
from hasten.calls import Call, Reply
from hasten.serve_options import ServeOptions

LAST = re.compile(rb"\r\nconnection: close\r\n", re.IGNORECASE)


def request(text: str, *, version: str = "1.1", path: str = "/predict", more: str = "") -> bytes:
    body = f'{{"inputs": "{text}"}}'
    return f"POST {path} HTTP/{version}\r\nhost: x\r\n{more}content-length: {len(body)}\r\n\r\n{body}".encode()


@contextmanager
def connected(url: str) -> Generator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as client:
        yield client


def told(client: socket.socket, replies: int) -> bytes:
    said = b""
    while said.count(b"HTTP/1.1 ") < replies or not said.endswith(b"]"):
        more = client.recv(65536)
        assert more, said
        said += more
    return said


@pytest.fixture
def asgi(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes what goes through ASGI."""

    class Noting(server.Endpoint):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["path"])
            await super().__call__(scope, receive, send)

    seen: list[str] = []
    monkeypatch.setattr(server, "Endpoint", Noting)
    return seen


def names(said: bytes) -> list[bytes]:
    return [line.partition(b":")[0] for line in said.partition(b"\r\n\r\n")[0].splitlines()]


def test_both_ways_reply_the_same(asgi: list[str]) -> None:
    with live(make_app()) as url, connected(url) as client:
        client.sendall(request("fine"))
        direct = told(client, 1)
        assert asgi == []
        client.sendall(request("fine", path="/predict?a=b"))  # a query goes the long way
        other = told(client, 1)
        assert asgi == ["/predict"]
    assert direct.rpartition(b"\r\n")[2] == other.rpartition(b"\r\n")[2]
    assert names(direct) == names(other)
    assert b"date" in names(direct)


def test_requests_that_do_not_wait_are_answered_in_their_order(asgi: list[str]) -> None:
    with live(make_app()) as url, connected(url) as client:
        client.sendall(request("a") + request("bb") + request("ccc", path="/"))
        said = told(client, 3)
        assert asgi == ["/predict", "/"]  # only the first found the connection free
        client.sendall(request("a"))
        assert told(client, 1).rpartition(b"\r\n")[2] in said
        assert len(asgi) == 2


@pytest.mark.parametrize(("version", "more"), [("1.0", ""), ("1.1", "connection: close\r\n")])
def test_a_connection_that_is_not_to_be_kept_is_closed(version: str, more: str) -> None:
    with live(make_app()) as url, connected(url) as client:
        client.sendall(request("fine", version=version, more=more))
        said = told(client, 1)
        assert LAST.search(said)
        assert client.recv(100) == b""


def test_a_server_that_ends_answers_what_it_has_begun() -> None:
    runtime = GatedRuntime()
    with ExitStack() as serving, connected(serving.enter_context(live(make_app(runtime)))) as client:
        client.sendall(request("begun"))
        assert runtime.entered.wait(5)
        ending = threading.Thread(target=serving.close)
        ending.start()
        runtime.gate.set()
        said = told(client, 1)
        assert said.startswith(b"HTTP/1.1 200 ")
        assert client.recv(100) == b""
        ending.join(10)


def test_a_mistake_in_an_answer_is_told_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def breaks(_service: Any, _call: Call) -> Reply:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr("hasten.server._Service.predict", breaks)
    with live(make_app()) as url, connected(url) as client:
        client.sendall(request("fine"))
        said = b"".join(iter(lambda: client.recv(100), b""))
    assert said.startswith(b"HTTP/1.1 500 ")
    assert LAST.search(said)
    assert "a mistake of ours" in caplog.text


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> float:
    """Connections that wait for their next request are closed soon."""
    made = connection.Connection.connection_made

    def connection_made(self: connection.Connection, transport: Any) -> None:
        made(self, transport)
        cast("Any", self).timeout_keep_alive = 0.3

    monkeypatch.setattr(connection.Connection, "connection_made", connection_made)
    return 0.3


LATE = "x-hasten-deadline-ms: 0.0001\r\n"


def test_a_refusal_whose_body_comes_later_does_not_keep_the_connection_for_ever(soon: float) -> None:
    with live(make_app()) as url, connected(url) as client:
        head, body = request("fine", more=LATE).split(b"\r\n\r\n")
        client.sendall(head + b"\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 429 ")
        client.sendall(body)
        began_s = perf_counter()
        assert client.recv(100) == b""
        assert perf_counter() - began_s >= soon / 2


def test_a_body_that_was_refused_may_pause_longer_than_an_idle_connection(soon: float) -> None:
    with live(make_app()) as url, connected(url) as client:
        head, body = request("fine", more=LATE).split(b"\r\n\r\n")
        client.sendall(head + b"\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 429 ")
        time.sleep(2 * soon)
        client.sendall(body + request("fine"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_line_that_begins_no_request_does_not_keep_the_connection_for_ever(soon: float) -> None:
    with live(make_app()) as url, connected(url) as client:
        client.sendall(request("fine"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"\r\n")
        client.settimeout(20 * soon)
        assert client.recv(100) == b""


def test_a_request_right_behind_a_refused_one_has_its_time(soon: float) -> None:
    runtime = GatedRuntime()
    with live(make_app(runtime)) as url, connected(url) as client:
        client.sendall(request("late", more=LATE) + request("fine"))
        assert runtime.entered.wait(5)
        time.sleep(2 * soon)
        runtime.gate.set()
        said = told(client, 2)
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"429", b"200"]


def test_a_refused_request_that_waits_for_leave_to_send_its_body_ends_the_connection() -> None:
    head = request("fine", more=LATE + "expect: 100-continue\r\n").partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    with live(make_app()) as url, connected(url) as client:
        client.sendall(head)
        said = b"".join(iter(lambda: client.recv(65536), b""))
    assert said.startswith(b"HTTP/1.1 429 ")
    assert LAST.search(said)


def test_a_body_that_takes_too_long_is_refused_after_the_reply_that_is_owed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_S", 0.3)
    runtime = GatedRuntime()
    with live(make_app(runtime)) as url, connected(url) as client:
        client.sendall(request("first") + request("second")[:-3])
        assert runtime.entered.wait(5)
        time.sleep(0.6)
        runtime.gate.set()
        said = b"".join(iter(lambda: client.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"200", b"408"]


def test_a_body_that_the_server_did_not_read_yet_does_not_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_S", 0.3)
    runtime, second = GatedRuntime(), request("second")
    with live(make_app(runtime)) as url, connected(url) as client:
        client.sendall(request("first") + second[:-3])
        assert runtime.entered.wait(5)
        client.sendall(second[-3:])
        time.sleep(0.8)
        runtime.gate.set()
        assert re.findall(rb"HTTP/1.1 (\d+)", told(client, 2)) == [b"200", b"200"]


def test_a_reply_before_an_expected_body_ends_the_connection_through_asgi_too() -> None:
    with live(make_app()) as url, connected(url) as client:
        client.sendall(b"POST /v2/models/other/infer HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
                       b"content-length: 5\r\nx-hasten-deadline-ms: none\r\n\r\n")  # fmt: skip
        said = b"".join(iter(lambda: client.recv(65536), b""))
    assert said.startswith(b"HTTP/1.1 422 ")
    assert LAST.search(said)


def test_a_client_that_does_not_read_is_left_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REPLY_S", 0.3)
    asked, length = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n", 0
    with live(make_app()) as url, connected(url) as client:
        with suppress(ConnectionError):
            for _ in range(1000):
                client.sendall(asked)
        time.sleep(1)
        with suppress(ConnectionError):
            while more := client.recv(65536):
                length += len(more)
        whole = len(httpx.get(f"{url}/openapi.json", timeout=10).content)
    assert 0 < length < 1000 * whole


def test_trailers_without_end_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_FRAMING_BYTES", 1000)
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    with live(make_app()) as url, connected(url) as client:
        client.sendall(head)
        client.sendall(b'f\r\n{"inputs": "a"}\r\n0\r\nx-more: ')
        with pytest.raises(ConnectionError):
            for _ in range(5000):
                client.sendall(b"a" * 1000)
                time.sleep(0.001)


HURRIED = ServeOptions(p99_ms=20.0)


@pytest.mark.parametrize("options", [OPTIONS, HURRIED])
@pytest.mark.parametrize("path", [b"/predict", b"/v2/models/onnx-fp32/infer"])
def test_what_the_server_ends_is_no_client_that_left(path: bytes, options: ServeOptions) -> None:
    with live(make_app(options=options)) as url:
        with connected(url) as client:
            client.sendall(b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{")
            time.sleep(0.05)
            client.sendall(b'"inp\r\nzz\r\n')
            assert b" 400 " in client.recv(1000)
            assert client.recv(1000) == b""
        time.sleep(0.05)
        told = httpx.get(f"{url}/metrics", timeout=10).text
        assert 'hasten_requests_total{status="400"} 1.0' in told
        assert 'status="499"' not in told
        assert "hasten_clients_gone_total 0.0" in told


@pytest.mark.parametrize("options", [OPTIONS, HURRIED])
def test_a_client_that_leaves_in_the_middle_of_its_body_is_counted(options: ServeOptions) -> None:
    with live(make_app(options=options)) as url:
        with connected(url) as client:
            client.sendall(request("fine")[:-3])
            time.sleep(0.1)
        for _ in range(1000):
            if 'hasten_requests_total{status="499"} 1.0' in httpx.get(f"{url}/metrics", timeout=10).text:
                return
    raise AssertionError("not counted")


def test_a_body_that_is_too_large_and_slow_is_too_large() -> None:
    with live(make_app(options=HURRIED)) as url, connected(url) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 400000\r\n\r\n" + b" " * 100_000)
        time.sleep(0.05)
        client.sendall(b" " * 200_000)
        assert b" 413 " in client.recv(1000)
