"""A request as its client lets it come, and leaves it: bodies that are slow or large, clients that go."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect, Request

from hasten.asked import RequestError

BODY_S = 30.0
T = TypeVar("T")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, counted as it comes: a Content-Length may lie or be missing.

    Args:
        request: A request of which nothing was read.
        max_bytes: Largest body.

    Returns:
        All of it.

    Raises:
        RequestError: It is larger (413), or does not come in `BODY_S` (408).
        ClientDisconnect: The client left before.
    """
    body, closing = bytearray(), {"connection": "close"}
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise RequestError(413, "validation", f"the body is above {max_bytes} bytes", closing)
    except TimeoutError as error:
        raise RequestError(408, "validation", f"the body took more than {BODY_S:g} s to come", closing) from error
    return bytes(body)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Does the work, but drops it as soon as the client leaves.

    Args:
        request: A request whose body was read.
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
    gone: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
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
