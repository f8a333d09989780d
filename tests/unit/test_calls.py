from __future__ import annotations

import asyncio
from typing import Any

from hasten.asgi_calls import Endpoint
from hasten.calls import Call, Reply


async def answer(call: Call) -> Reply:
    body = await call.body(100) + (call.header("x-name") or "").encode()
    return Reply(status=201, body=body, headers={"x-said": "é"})


def test_a_reply_through_asgi_is_whole() -> None:
    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"asked", "more_body": False}

    sent: list[Any] = []
    asyncio.run(Endpoint(answer)({"type": "http", "headers": [(b"x-name", b"\xe9")]}, receive, send))
    start, body = sent
    assert (start["status"], body["body"]) == (201, b"asked\xc3\xa9")
    assert dict(start["headers"]) == {
        b"x-said": b"\xe9", b"content-type": b"application/json", b"content-length": b"7"
    }  # fmt: skip


def test_on_the_wire_it_is_the_same() -> None:
    reply = Reply(status=429, body=b"{}", headers={"x-said": "é"})
    assert reply.message([(b"date", b"today")]) == (
        b"HTTP/1.1 429 Too Many Requests\r\ndate: today\r\nx-said: \xe9\r\n"
        b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
    )
