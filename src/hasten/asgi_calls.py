"""Requests that come through ASGI: bodies that are large, clients that go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from time import perf_counter
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect

from hasten.asked import ended_by_the_server, too_large
from hasten.calls import ENDED, READ_S, Call, Reply

T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class AsgiCall(Call):
    """A request of which ASGI has told the head."""

    __slots__ = ("_receive", "_state")

    def __init__(self, scope: Message, receive: Receive) -> None:
        """Takes ASGI's scope and its `receive`; without a connection that tells, the request was read now."""
        self._state: Mapping[str, Any] = scope.get("state", {})
        super().__init__(scope["headers"], self._state.get(READ_S) or perf_counter(), scope.get("path_params", {}))
        self._receive = receive

    async def body(self, most: int) -> bytes:
        """As `Call.body`; counted as it comes, for a Content-Length may lie or be missing."""
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ended_by_the_server(self._state[ENDED]) if ENDED in self._state else ClientDisconnect
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large(most)
            if not message.get("more_body", False):
                self.read_s = self._state.get(READ_S) or self.read_s
                return bytes(body)

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """As `Call.unless_gone`."""
        task, working, left = cast("asyncio.Task[Any]", asyncio.current_task()), True, False

        def drop(gone: asyncio.Future[Any]) -> None:
            nonlocal left
            if working and not gone.cancelled():
                left = task.cancel()

        # The body has been read, so the next message can only tell that the client left.
        gone: asyncio.Future[Any] = asyncio.ensure_future(self._receive())
        gone.add_done_callback(drop)
        try:
            return await work
        except asyncio.CancelledError:
            if not left or task.uncancel():
                raise
            raise ClientDisconnect from None
        finally:
            working = False
            gone.cancel()


class Endpoint:
    """An ASGI app that answers each call with a reply.

    Args:
        answer: Makes the reply; must not raise.
    """

    def __init__(self, answer: Callable[[Call], Awaitable[Reply]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Message, receive: Receive, send: Callable[[Message], Awaitable[None]]) -> None:
        """Answers one call; the three arguments are ASGI's."""
        reply = await self._answer(AsgiCall(scope, receive))
        await send({"type": "http.response.start", "status": reply.status, "headers": reply.raw_headers})
        await send({"type": "http.response.body", "body": reply.body})
