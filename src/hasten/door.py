"""Refusal at the door: what has no chance is told so before the app hears of it.

Under overload most requests are refused, on the core that inference needs, so what a refusal costs is taken from the
answers. An ASGI middleware costs a fraction of routing, a request object and a response object.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A reply as ASGI sends it.

    Attributes:
        status: HTTP status.
        headers: Names in lower case, and values.
        body: All of it; its length is sent along.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Door:
    """ASGI middleware that asks a keeper about each POST.

    Args:
        app: What is behind the door.
        keeper: From a request's scope to the reply that it gets here, or None to let it in.
    """

    def __init__(self, app: Any, keeper: Callable[[MutableMapping[str, Any]], Reply | None]) -> None:
        self._app, self._keeper = app, keeper

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Replies, or lets the request in; the three arguments are ASGI's."""
        reply = self._keeper(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        if reply is None:
            await self._app(scope, receive, send)
            return
        headers = [*reply.headers, (b"content-length", str(len(reply.body)).encode())]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body})
