"""What comes over a socket from clients that are broken or hostile: each gets a clear answer, and the others theirs."""

from __future__ import annotations

import gzip
import json
import re
import select
import socket
import time
from collections.abc import Generator
from contextlib import ExitStack

import httpx
import pytest
from serving import GatedRuntime, expected, live, make_app

from hasten import connection

GOOD = b'{"inputs": "a"}'
DEEP = 100_000


def request(body: bytes = GOOD, *headers: bytes, length: bytes | None = None, start: bytes = b"POST /predict") -> bytes:
    size = str(len(body)).encode() if length is None else length
    head = [start + b" HTTP/1.1", b"host: x", b"content-length: " + size, *headers]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def chunked(rest: bytes) -> bytes:
    return b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + rest


CASES: dict[str, tuple[bytes, list[int]]] = {
    "pipelined": (request() * 3, [200, 200, 200]),
    "too many pipelined": (request() * 5000, [200] * 65 + [429]),
    "chunked": (chunked(b"f\r\n" + GOOD + b"\r\n0\r\n\r\n"), [200]),
    "expecting": (request(GOOD, b"expect: 100-continue"), [100, 200]),
    "a NUL": (request(b'{"inputs": "a\\u0000b"}'), [200]),
    "special tokens": (request(b'{"inputs": "[SEP] a [CLS]"}'), [200]),
    "a long word": (request(b'{"inputs": "' + b"w" * DEEP + b'"}'), [200]),
    "an odd id": (request(GOOD, b"x-request-id: \xe9\xff" + b"i" * 5000), [200]),
    "a length too short": (request(length=b"5"), [400, 400]),
    "a negative length": (request(length=b"-5"), [400]),
    "no number for a length": (request(length=b"NaN"), [400]),
    "two lengths": (request(GOOD, b"content-length: 3"), [400]),
    "a length and chunks": (request(GOOD, b"transfer-encoding: chunked"), [400]),
    "a chunk of no size": (chunked(b"zz\r\nabc\r\n0\r\n\r\n"), [400]),
    "a chunk of 2^64": (chunked(b"ffffffffffffffff\r\n" + b"x" * 300_000), [413]),
    "a gzip bomb": (request(gzip.compress(b"0" * 10_000_000), b"content-encoding: gzip"), [400]),
    "deep lists": (request(b"[" * DEEP), [422]),
    "deep lists in a field": (request(b'{"inputs":' + b"[" * DEEP + b"]" * DEEP + b"}"), [422]),
    "deep lists in an unknown field": (request(b'{"inputs":"a","x":' + b"[" * DEEP + b"]" * DEEP + b"}"), [400]),
    "a lone surrogate": (request(b'{"inputs": "\\ud800"}'), [400]),
    "broken UTF-8": (request(b'{"inputs": "\xff\xfe"}'), [400]),
    "no number": (request(b'{"inputs": NaN}'), [400]),
    "100 MB": (request(b'{"inputs": "' + b"a " * 50_000_000 + b'"}'), [413]),
    "a large head": (request(GOOD, b"x-a: " + b"a" * 1_000_000), [431]),
    "many headers": (request(GOOD, *(b"x-%d: y" % number for number in range(50_000))), [431]),
    "another protocol": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50, [400]),
    "no protocol": (b"hello\r\n\r\n", [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "another method": (request(start=b"TRACE /predict"), [405]),
    "a path upwards": (request(start=b"POST /../../etc/passwd"), [404]),
    "a path of odd bytes": (request(start=b"POST /v2/models/%ff%00/infer"), [404]),
    "an upgrade": (request(GOOD, b"connection: upgrade", b"upgrade: websocket"), [200]),
    "an upgrade of HTTP/1.1, as Java asks for": (
        request(GOOD, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAEAAEAAAAIA"),
        [200],
    ),
    "a request, then no protocol": (request() + b"hello\r\n\r\n", [200, 400]),
    "a request, then an upgrade": (request() + request(GOOD, b"connection: upgrade", b"upgrade: a"), [200, 400]),
    "a request, then a chunk of no size": (request() + chunked(b"zz\r\nabc\r\n"), [200, 400]),
    "the word in a body": (request(b'{"inputs": "a\\r\\nupgrade: b"}'), [200]),
}


@pytest.fixture(scope="module")
def port() -> Generator[int]:
    with live(make_app()) as url:
        yield int(url.rpartition(":")[2])


def talk(port: int, data: bytes, answers: int) -> bytes:
    """What a server says to some bytes until it has answered so often, or closed."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        try:
            client.sendall(data)
            while len(statuses(said)) < answers and (more := client.recv(65536)):
                said += more
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was closed before everything was sent; what it said may be lost with it
    return said


def statuses(said: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d{3}) ", said)]


def check_others(port: int) -> None:
    reply = httpx.post(f"http://127.0.0.1:{port}/predict", json={"inputs": "a fine day"}, timeout=5)
    assert (reply.status_code, reply.json()) == (200, expected("a fine day"))


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_hostile_request_gets_a_clear_answer_and_harms_nobody(name: str, port: int) -> None:
    data, wanted = CASES[name]
    said = talk(port, data, len(wanted))
    # A server that refuses and closes while a client still sends may have its answer lost on the way (RFC 9112, 9.6).
    assert statuses(said) == wanted or (wanted[0] in (413, 431) and not said)
    check_others(port)


def test_a_length_too_long_and_a_client_that_leaves_harm_nobody(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(request(length=b"100"))
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""  # a client that closes its side has left
    check_others(port)


def test_a_head_that_begins_behind_a_large_body_is_counted_from_its_own_start(port: int) -> None:
    large, small = request(b'{"inputs": "' + b"w" * DEEP + b'"}'), request()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(large + small[:20])
        said = client.recv(65536)
        client.sendall(small[20:])
        while len(statuses(said)) < 2 and (more := client.recv(65536)):
            said += more
    assert statuses(said) == [200, 200]


@pytest.mark.parametrize("before", [0, 2])
def test_a_large_head_is_refused_after_what_is_owed(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_HEAD_BYTES", 1000)
    head = request(GOOD, b"x-a: " + b"a" * 2000)[:1800]
    with live(make_app()) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 10) as client:
        client.sendall(request() * before + head[:100])
        time.sleep(0.05)
        client.sendall(head[100:])
        said = b"".join(iter(lambda: client.recv(65536), b""))
    assert statuses(said) == [200] * before + [431]


def test_nothing_is_read_while_requests_that_were_read_wait() -> None:
    runtime, many = GatedRuntime(), request(b'{"inputs": "fine"}') * 60
    with (
        live(make_app(runtime)) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 10) as client,
    ):
        client.sendall(many)
        assert runtime.entered.wait(5)
        client.sendall(many)
        runtime.gate.set()
        said = b""
        while len(statuses(said)) < 120 and (more := client.recv(65536)):
            said += more
    assert statuses(said) == [200] * 120


@pytest.mark.parametrize("start", [20, 200], ids=["head", "body"])
def test_bytes_that_drip_win_no_time(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.5)
    monkeypatch.setattr(connection, "BODY_S", 0.5)
    whole = request(b'{"inputs": "' + b"a" * 2000 + b'"}', b"x-a: " + b"b" * 40)
    with live(make_app()) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 10) as client:
        client.sendall(whole[:start])
        for at in range(start, start + 60):  # three seconds
            if select.select([client], [], [], 0.05)[0]:
                break
            client.sendall(whole[at : at + 1])
        assert statuses(client.recv(65536)) == [408]


def test_clients_that_send_a_byte_now_and_then_are_closed_and_harm_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.5)
    monkeypatch.setattr(connection, "BODY_S", 0.5)
    whole = request()
    with live(make_app()) as url, ExitStack() as stack:
        port = int(url.rpartition(":")[2])
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(100)]
        starts = [20 if number % 2 else len(whole) - 5 for number in range(100)]  # within the head, within the body
        for client, start in zip(slow, starts, strict=True):
            client.sendall(whole[:start])
        time.sleep(0.2)
        for client, start in zip(slow, starts, strict=True):
            client.sendall(whole[start : start + 1])
        check_others(port)
        for client in slow:
            assert statuses(client.recv(65536)) == [408]


def test_a_body_that_dawdles_after_its_refusal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_S", 0.3)
    late = request(GOOD, b"x-hasten-deadline-ms: 0.000001")
    with live(make_app()) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 5) as client:
        client.sendall(late[:-1])
        said = b""
        while more := client.recv(65536):
            said += more
    assert statuses(said) == [429]


def test_a_connection_that_waits_between_requests_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    with live(make_app()) as url, httpx.Client(base_url=url) as client:
        ports = set[int]()
        for _ in range(2):
            with client.stream("POST", "/predict", content=json.dumps({"inputs": "a"})) as reply:
                ports.add(reply.extensions["network_stream"].get_extra_info("client_addr")[1])
                assert json.loads(reply.read()) == expected("a")
            time.sleep(0.6)
    assert len(ports) == 1
