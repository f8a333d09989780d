"""uvicorn's connection, with bounds on a request: the bytes of its head, and the seconds that head and body may take.

uvicorn with httptools bounds none of them, so one client could hold a connection for ever, or fill the memory with
headers.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD_BYTES = 64 * 1024
HEAD_S, BODY_S = 10.0, 30.0


class Connection(HttpToolsProtocol):
    """A connection that is closed with 431 where a head is too large, with 408 where head or body take too long."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Waits for the first head."""
        super().connection_made(transport)
        self._head_bytes: int | None = 0  # None between a head and the next request
        self._in_body = False
        self._late = self.loop.call_later(HEAD_S, self._refuse, HTTPStatus.REQUEST_TIMEOUT)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no more."""
        self._late.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        if self._head_bytes is None:
            self._head_bytes = 0
            self._late = self.loop.call_later(HEAD_S, self._refuse, HTTPStatus.REQUEST_TIMEOUT)

    def on_headers_complete(self) -> None:
        """A head is there."""
        self._late.cancel()
        self._head_bytes, self._in_body = None, True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A body is there."""
        self._late.cancel()
        self._in_body = False
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

    def _refuse(self, status: HTTPStatus) -> None:
        self._late.cancel()
        if self.transport.is_closing():
            return
        if not (self._in_body and self.cycle.response_started):  # else it was refused before its body came
            line = f"HTTP/1.1 {status.value} {status.phrase}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            self.transport.write(line.encode())
        self.transport.close()
