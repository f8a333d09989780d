"""A request to classify and its reply, whatever brought them: ASGI, or the connection itself.

Routing, a request object, a response object, ASGI's messages and the handlers round them cost more than a small model's
tokenizer does, each time with caches that inference has just emptied. What is asked most is therefore handed from the
connection to its endpoint; everything else goes through ASGI.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import Any, TypeVar

T = TypeVar("T")
RawHeaders = Iterable[tuple[bytes, bytes]]

READ_S, SHORT_WAY, ENDED = "hasten_read_s", "hasten_short_way", "hasten_ended"  # in ASGI's state


class Call(ABC):
    """A request of which the head is there.

    Attributes:
        read_s: When it was read, by `perf_counter`.
        params: What routing found in the path.
        body_is_awaited: Whether `body` waits for what has not come.
    """

    body_is_awaited = True
    __slots__ = ("_headers", "params", "read_s")

    def __init__(self, headers: RawHeaders, read_s: float, params: Mapping[str, str]) -> None:
        """Takes ASGI's headers (names in lower case), when they were read, and what routing found."""
        self._headers = dict(headers)
        self.read_s = read_s
        self.params = params

    def header(self, name: str) -> str | None:
        """A header by its name in lower case; of several, the last."""
        value = self._headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    @abstractmethod
    async def body(self, most: int) -> bytes:
        """The body; to be asked for once.

        Args:
            most: Largest, in bytes.

        Returns:
            All of it.

        Raises:
            RequestError: It is larger (413).
            ClientDisconnect: The client left before.
        """

    @abstractmethod
    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Does the work, but drops it as soon as the client leaves.

        Args:
            work: What to do for the request, after its body was read.

        Returns:
            What the work gives.

        Raises:
            ClientDisconnect: The client left before; the work was cancelled.
        """


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

    @property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """All headers, as ASGI has them."""
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self.headers.items()]
        return [*headers, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.body))]

    def message(self, more: RawHeaders = ()) -> bytes:
        """The reply as HTTP/1.1 has it on the wire (RFC 9112), with further headers."""
        first = b"".join([b"%b: %b\r\n" % header for header in more])
        own = "".join([f"{name}: {value}\r\n" for name, value in self.headers.items()]).encode("latin-1")
        last = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(self.body)
        return b"".join((_status_line(self.status), first, own, last, self.body))


@cache
def _status_line(status: int) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (status, HTTPStatus(status).phrase.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortWay:
    """What a connection may do itself.

    Attributes:
        answers: Replies to a POST, by path; must not raise.
        refusal: The reply to a request for one of these that could only be late; None where it may be in time.
        most_body: Largest body, in bytes; of a larger one, no more is kept than shows that it is.
    """

    answers: Mapping[bytes, Callable[[Call], Awaitable[Reply]]]
    refusal: Callable[[Call], Reply | None]
    most_body: int
