"""uvicorn's connection, with bounds on a request: the bytes of its head, and the seconds that head and body may take.

uvicorn with httptools bounds none of them, so one client could hold a connection for ever, or fill the memory with
headers.

Under overload most requests are refused, on the core that inference needs, so what a refusal costs is taken from the
answers. One that could only be late is refused here, when its head is there, without a task or a message to the app.
When it was read is told along: what has waited for the loop has waited for its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from time import perf_counter
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hasten.calls import READ_S, REFUSAL, Call, Reply

MOST_HEAD_BYTES = 64 * 1024
HEAD_S, BODY_S = 10.0, 30.0
ASKED = (b"/predict", b"/")
ROUND = "hasten_round"


class Round:
    """When an event loop came back from waiting: what it reads now had come by then."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._began_s: float | None = None

    def began_s(self) -> float:
        """By `perf_counter`."""
        if self._began_s is None:
            self._began_s = perf_counter()
            self._loop.call_soon(self._end)
        return self._began_s

    def _end(self) -> None:
        self._began_s = None


class Connection(HttpToolsProtocol):
    """A connection that is closed with 431 where a head is too large, with 408 where head or body take too long."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Waits for the first head."""
        super().connection_made(transport)
        self._head_bytes: int | None = 0  # None between a head and the next request
        self._in_body = self._refused = False
        self._round: Round = self.app_state.setdefault(ROUND, Round(self.loop))  # one for all connections of a server
        self._refusal: Callable[[Call], Reply | None] | None = self.app_state.get(REFUSAL)
        self._late = self.loop.call_later(HEAD_S, self._refuse, HTTPStatus.REQUEST_TIMEOUT)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no more."""
        self._late.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self.scope["state"] = self.app_state | {READ_S: self._round.began_s()}
        if self._head_bytes is None:
            self._head_bytes = 0
            self._late = self.loop.call_later(HEAD_S, self._refuse, HTTPStatus.REQUEST_TIMEOUT)

    def on_headers_complete(self) -> None:
        """A head is there."""
        self._late.cancel()
        self._head_bytes, self._in_body = None, True
        self._refused = self._refuse_the_late()
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body, which nobody waits for if it was refused."""
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A body is there."""
        self._late.cancel()
        self._in_body = False
        if not self._refused:
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Counts what comes of a head that is not complete, and waits for a body that did not come with its head."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)  # none again where the head ends in it, 0 where the next one begins in it
        super().data_received(data)
        if (self._head_bytes or 0) > MOST_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif self._in_body and self._late.cancelled() and not self.transport.is_closing():
            self._late = self.loop.call_later(BODY_S, self._refuse, HTTPStatus.REQUEST_TIMEOUT)

    def _refuse_the_late(self) -> bool:
        """Replies to a request that could only be late, where no other is being answered on this connection."""
        cycle: Any = self.cycle  # None before the first
        parser: Any = self.parser
        free = cycle is None or cycle.response_complete
        if self._refusal is None or not free or self.url not in ASKED or parser.get_method() != b"POST":
            return False
        if (reply := self._refusal(Call({**self.scope}, _nothing))) is None:
            return False
        self.transport.write(reply.message())
        self._unset_keepalive_if_required()
        if self.expect_100_continue or not parser.should_keep_alive():
            self.transport.close()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        return True

    def _refuse(self, status: HTTPStatus) -> None:
        self._late.cancel()
        if self.transport.is_closing():
            return
        replied = self._in_body and (self._refused or self.cycle.response_started)  # a refusal that awaited no body
        if not replied:
            line = f"HTTP/1.1 {status.value} {status.phrase}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            self.transport.write(line.encode())
        self.transport.close()


async def _nothing() -> Any:
    raise RuntimeError("the body of a refused request is not read")
