"""Requests are sent when they are due, and each is accounted for once, whatever the server does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten import open_loop
from hasten.errors import UsageError
from hasten.open_loop import FAILED, Outcome, post_when_due

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]"


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    return head, await reader.readexactly(length)


def asked(behaviour: Behaviour, bodies: list[bytes], due_s: list[float], path: str = "/predict") -> list[Outcome]:
    async def run() -> list[Outcome]:
        ended = list[asyncio.Task[None]]()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if (task := asyncio.current_task()) is not None:
                ended.append(task)
            try:
                await behaviour(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            found = await post_when_due(f"http://127.0.0.1:{port}{path}", bodies, due_s, {"x-name": "value"})
            await asyncio.wait_for(asyncio.gather(*ended, return_exceptions=True), 10)
        return found

    return asyncio.run(run())


@settings(max_examples=25)
@given(st.lists(st.tuples(st.binary(max_size=300), st.floats(0, 0.05)), min_size=1, max_size=30))
def test_every_body_arrives_whole_once_and_not_before_it_is_due(requests: list[tuple[bytes, float]]) -> None:
    seen, due_s = list[bytes](), sorted(due for _, due in requests)
    bodies = [b"%d:%b" % (position, body) for position, (body, _) in enumerate(requests)]

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body = await read_request(reader)
            assert head.startswith(b"POST /predict HTTP/1.1\r\nhost: 127.0.0.1:")
            assert b"\r\nx-name: value\r\n" in head
            seen.append(body)
            writer.write(OK)

    found = asked(answers, bodies, due_s)
    assert sorted(seen) == sorted(bodies)
    assert [outcome.status for outcome in found] == [200] * len(bodies)
    assert all(0 <= outcome.sent_s <= outcome.ended_s for outcome in found)


def test_a_slow_reply_holds_up_nobody() -> None:
    quick = list[bytes]()

    async def first_is_slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_request(reader)
            while body == b"slow" and len(quick) < 20:
                await asyncio.sleep(0.005)
            quick.append(body)
            writer.write(OK)

    found = asked(first_is_slow, [b"slow"] + [b"quick"] * 20, [0.0] + [0.01 * k for k in range(1, 21)])
    assert {outcome.status for outcome in found} == {200}
    assert quick == [b"quick"] * 20 + [b"slow"]


def test_latency_counts_from_when_a_request_was_due(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(OK)

    monkeypatch.setattr(open_loop, "LEAD_S", -0.5)  # all are due half a second ago, as behind a stall
    assert all(outcome.ended_s >= outcome.sent_s >= 0.5 for outcome in asked(answers, [b"{}"] * 3, [0.0, 0.0, 0.0]))


def test_connections_are_used_again_unless_the_server_closes_them() -> None:
    opened = list[int]()

    def behaviour(reply: bytes) -> Behaviour:
        async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            opened.append(1)
            while True:
                await read_request(reader)
                writer.write(reply)

        return answers

    due_s = [0.05 * k for k in range(5)]
    assert {outcome.status for outcome in asked(behaviour(OK), [b"{}"] * 5, due_s)} == {200}
    assert len(opened) == 1
    closing = OK.replace(b"200 OK", b"429 Too Many Requests\r\nconnection: close")
    assert {outcome.status for outcome in asked(behaviour(closing), [b"{}"] * 5, due_s)} == {429}
    assert len(opened) == 6


def test_a_reply_may_come_in_pieces_and_in_chunks() -> None:
    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            for part in (b"HTTP/1.1 2", b"00 OK\r\ntransfer-enc", b"oding: chunked\r\n\r\n2\r\n[]\r\n", b"0\r\n\r\n"):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)

    assert {outcome.status for outcome in asked(answers, [b"{}"] * 3, [0.0, 0.1, 0.2])} == {200}


def test_a_path_is_asked_with_its_query() -> None:
    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_request(reader)
        writer.write(OK if head.startswith(b"POST /a/b?for=/predict HTTP/1.1\r\n") else b"HTTP/1.1 404 No\r\n\r\n")

    assert [outcome.status for outcome in asked(answers, [b"{}"], [0.0], "/a/b?for=/predict#c")] == [200]


def test_what_comes_before_a_reply_is_none_and_a_reply_nobody_asked_for_ends_a_connection() -> None:
    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(OK + OK)
        await reader.read(-1)

    found = asked(answers, [b"{}"] * 3, [0.0, 0.1, 0.2])
    assert [outcome.status for outcome in found] == [200] * 3
    assert all(outcome.ended_s >= 0.02 for outcome in found)


@pytest.mark.parametrize("reply", [b"", b"nonsense\r\n\r\n", OK[:-1], b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n"])
def test_what_has_no_reply_has_failed(reply: bytes) -> None:
    async def leaves(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(reply)

    assert [outcome.status for outcome in asked(leaves, [b"{}"] * 3, [0.0, 0.01, 0.02])] == [FAILED] * 3


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_loop, "TIMEOUT_S", 0.2)

    async def hangs(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    found = asked(hangs, [b"{}", b"{}"], [0.0, 0.05])
    assert [outcome.status for outcome in found] == [FAILED, FAILED]
    assert 0.2 <= found[0].ended_s < 2
    assert all(outcome.sent_s < outcome.ended_s for outcome in found)


def test_where_nobody_listens_all_fail() -> None:
    found = asyncio.run(post_when_due("http://127.0.0.1:9", [b"{}"] * 2, [0.0, 0.01], {}))
    assert [outcome.status for outcome in found] == [FAILED, FAILED]


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://a", "http://", "http://a:b", "http://[", "/a"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is not where a server is"):
        asyncio.run(post_when_due(url, [b"{}"], [0.0], {}))
