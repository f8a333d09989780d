from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hasten.calls import Call, Endpoint, Reply, ShortWay


def sent_by(app: Any, **scope: Any) -> list[Any]:
    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"asked", "more_body": False}

    sent: list[Any] = []
    asyncio.run(app({"type": "http", "method": "POST", "path": "/short", "headers": [], **scope}, receive, send))
    return sent


async def answer(call: Call) -> Reply:
    body = (await call.receive())["body"] + (call.header("x-name") or "").encode()
    return Reply(status=201, body=body, headers={"x-said": "é"})


async def elsewhere(_scope: Any, _receive: Any, send: Any) -> None:
    await send("elsewhere")


APP = ShortWay(elsewhere, {"/short": Endpoint(answer)})


def test_a_post_goes_the_short_way_and_its_reply_is_whole() -> None:
    start, body = sent_by(APP, headers=[(b"x-name", b"\xe9")])
    assert (start["status"], body["body"]) == (201, b"asked\xc3\xa9")
    assert dict(start["headers"]) == {
        b"x-said": b"\xe9", b"content-type": b"application/json", b"content-length": b"7"
    }  # fmt: skip


@pytest.mark.parametrize(
    "scope", [{"method": "GET"}, {"path": "/short/"}, {"path": "/"}, {"type": "websocket"}, {"type": "lifespan"}]
)
def test_everything_else_goes_on(scope: dict[str, Any]) -> None:
    assert sent_by(APP, **scope) == ["elsewhere"]
