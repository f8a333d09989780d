"""A request as its client lets it come, and leaves it: bodies that are large, clients that go."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect

from hasten.asked import RequestError
from hasten.calls import Receive

T = TypeVar("T")


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The body, counted as it comes: a Content-Length may lie or be missing.

    Args:
        receive: ASGI's, of a request of which nothing was read.
        max_bytes: Largest body.

    Returns:
        All of it.

    Raises:
        RequestError: It is larger (413).
        ClientDisconnect: The client left before.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise RequestError(413, "validation", f"the body is above {max_bytes} bytes", {"connection": "close"})
        if not message.get("more_body", False):
            return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Does the work, but drops it as soon as the client leaves.

    Args:
        receive: ASGI's, of a request whose body was read.
        work: What to do for it.

    Returns:
        What the work gives.

    Raises:
        ClientDisconnect: The client left before; the work was cancelled.
    """
    task, working, left = cast("asyncio.Task[Any]", asyncio.current_task()), True, False

    def drop(gone: asyncio.Future[Any]) -> None:
        nonlocal left
        if working and not gone.cancelled():
            left = task.cancel()

    # The body has been read, so the next message can only tell that the client left.
    gone: asyncio.Future[Any] = asyncio.ensure_future(receive())
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
