"""A request to classify and its reply as ASGI has them, on a way that is as short as it can be.

Routing, a request object, a response object and the handlers round them cost more than a small model's tokenizer does,
each time with caches that inference has just emptied. `ShortWay` lets the paths that are asked most pass all of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from time import perf_counter
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

READ_S, REFUSAL = "hasten_read_s", "hasten_refusal"  # in ASGI's state


class Call:
    """A request of which only the head was read.

    Attributes:
        receive: ASGI's, for the body.
        params: What routing found in the path.
        read_s: When it was read, by `perf_counter`: when the connection tells, or now.
    """

    __slots__ = ("_headers", "params", "read_s", "receive")

    def __init__(self, scope: Message, receive: Receive) -> None:
        """Takes ASGI's scope and its `receive`."""
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self.receive = receive
        self.read_s: float = scope.get("state", {}).get(READ_S) or perf_counter()
        self.params: Mapping[str, str] = scope.get("path_params", {})

    def header(self, name: str) -> str | None:
        """A header by its name in lower case; of several, the last."""
        value = self._headers.get(name.encode())
        return None if value is None else value.decode("latin-1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A reply.

    Attributes:
        status: HTTP status.
        body: All of it, as JSON.
        headers: Beside its type and length, names in lower case.
    """

    status: int
    body: bytes
    headers: Mapping[str, str]

    async def send(self, send: Callable[[Message], Awaitable[None]]) -> None:
        """Sends it; the argument is ASGI's."""
        await send({"type": "http.response.start", "status": self.status, "headers": self._raw()})
        await send({"type": "http.response.body", "body": self.body})

    def message(self) -> bytes:
        """The same as HTTP/1.1 has it on the wire (RFC 9112)."""
        head = b"".join(b"%b: %b\r\n" % header for header in self._raw())
        return b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (self.status, HTTPStatus(self.status).phrase.encode(), head, self.body)

    def _raw(self) -> list[tuple[bytes, bytes]]:
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self.headers.items()]
        return [*headers, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.body))]


class Endpoint:
    """An ASGI app that answers each call with a reply.

    Args:
        answer: Makes the reply; must not raise.
    """

    def __init__(self, answer: Callable[[Call], Awaitable[Reply]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Message, receive: Receive, send: Callable[[Message], Awaitable[None]]) -> None:
        """Answers one call; the three arguments are ASGI's."""
        reply = await self._answer(Call(scope, receive))
        await reply.send(send)


class ShortWay:
    """ASGI middleware that hands some POSTs to their endpoints at once.

    Args:
        app: Where everything else goes.
        endpoints: By path.
    """

    def __init__(self, app: Any, endpoints: Mapping[str, Endpoint]) -> None:
        self._app, self._endpoints = app, endpoints

    async def __call__(self, scope: Message, receive: Receive, send: Callable[[Message], Awaitable[None]]) -> None:
        """Answers, or hands on; the three arguments are ASGI's."""
        short = scope["type"] == "http" and scope["method"] == "POST"
        await (self._endpoints.get(scope["path"], self._app) if short else self._app)(scope, receive, send)
