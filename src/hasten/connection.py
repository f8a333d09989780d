"""uvicorn's connection, with bounds on a request, and a way past ASGI for what is asked most.

uvicorn with httptools bounds neither the bytes of a head nor the seconds that head and body may take, nor how many
requests wait behind the one that is answered, so one client could hold a connection for ever, or fill the memory.

Where the app names a short way (`calls.ShortWay`), a POST to one of its paths is answered from here: without a scope to
route, messages to pass and a task that waits for the client to leave. Under overload most requests are refused, on the
core that inference needs, so what a refusal costs is taken from the answers: one that could only be late is refused
when its head is there, without a task. When a request was read is told along: what has waited for the loop has waited
for its answer.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sized
from http import HTTPStatus
from time import perf_counter
from typing import Any, TypeVar

from httptools import HttpParserError
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hasten.asked import ended_by_the_server, too_large
from hasten.calls import ENDED, READ_S, SHORT_WAY, Call, RawHeaders, Reply, ShortWay

T = TypeVar("T")

UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
MOST_HEAD_BYTES = 64 * 1024
MOST_FRAMING_BYTES = 2 * 1024**2  # of a body: what is not its content, such as sizes of chunks and trailers
MOST_PIPELINED = 64  # requests behind the one that is being answered
HEAD_S, BODY_S, REPLY_S = 10.0, 30.0, 30.0
ROUND = "hasten_round"
FAILED = Reply(
    status=500, body=b'{"error":"the server failed; its log tells why","error_type":"backend"}',
    headers={"connection": "close"},
)  # fmt: skip


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


class _Flow(FlowControl):
    """Does not go on reading while requests that were read wait."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        """Reads on, for the request whose turn it is, or for the next one."""
        if not self._waiting:
            super().resume_reading()


class DirectCall(Call):
    """A request that its connection answers, in the place of uvicorn's cycle of request and response.

    Attributes:
        answer: Makes the reply.
        most_body: Largest body, in bytes; no more is kept of a larger one than shows that it is.
        keep_alive: Whether the connection stays open after the reply.
        response_started: Whether a reply was sent.
        response_complete: The same: all of it is handed to the transport at once.
        disconnected: Whether the client left before.
        ended: The status with which the server ended the request before its body was there; None if it did not.
        message_event: Shared, and waited for by nobody; uvicorn sets it when a client leaves.
        content: What has come of the body.
        task: What answers, once the body is there.
    """

    __slots__ = (
        "answer", "content", "disconnected", "ended", "keep_alive", "most_body", "response_complete",
        "response_started", "task",
    )  # fmt: skip
    message_event = asyncio.Event()
    body_is_awaited = False

    def __init__(
        self, headers: RawHeaders, read_s: float, answer: Callable[[Call], Awaitable[Reply]], *, most_body: int,
        keep_alive: bool,
    ) -> None:  # fmt: skip
        """Takes ASGI's headers, when they were read, and what becomes of them."""
        super().__init__(headers, read_s, {})
        self.answer, self.most_body, self.keep_alive = answer, most_body, keep_alive
        self.response_started = self.response_complete = self.disconnected = False
        self.content = bytearray()
        self.ended: HTTPStatus | None = None
        self.task: asyncio.Task[None] | None = None

    async def body(self, most: int) -> bytes:
        """As `Call.body`; it is there, or will not come any more."""
        if self.ended is not None:
            raise ended_by_the_server(self.ended)
        if self.disconnected:
            raise ClientDisconnect
        if len(self.content) > most:
            raise too_large(most)
        content, self.content = bytes(self.content), bytearray()
        return content

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """As `Call.unless_gone`; the connection cancels the task."""
        try:
            return await work
        except asyncio.CancelledError:
            if not self.disconnected:
                raise
            raise ClientDisconnect from None


def without_upgrade(data: bytes) -> bytes:
    """What was received, its head's offer of another protocol renamed: a server may pass it over (RFC 9110, 7.8).

    The parser would take what follows such a head for that other protocol, and some clients offer one in every request.
    """
    found = UPGRADE.search(data, 0, data.find(b"\r\n\r\n") + 1 or len(data))
    return data if found is None else data[: found.start()] + b"\r\nx-upgrade:" + data[found.end() :]


class Connection(HttpToolsProtocol):
    """A connection that answers what is asked most itself.

    It is closed with 431 where a head, or what a body has beside its content, is too large, with 408 where head or body
    take too long, with 429 behind too many requests that wait for their replies, and without a word where a client
    takes too long to read.
    """

    cycle: Any  # uvicorn's, a `DirectCall`, or None before the first request
    parser: Any
    scope: Any

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Waits for the first head."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        self._head_bytes: int | None = 0  # None between a head and the next request
        self._in_body = self._refused = False
        self._unread: asyncio.TimerHandle | None = None  # until a client must have read what was written
        self._framing_bytes = 0  # of the body that comes
        self._owed = deque[Any]()  # a reply each: requests whose head was taken, as `cycle`, in the order they came
        self._last_words: bytes | None = None  # sent after the replies that are owed, before the connection is closed
        self._round: Round = self.app_state.setdefault(ROUND, Round(self.loop))  # one for all connections of a server
        self._short_way: ShortWay | None = self.app_state.get(SHORT_WAY)
        self._late = self.loop.call_later(HEAD_S, self._time_out, HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no more."""
        self._late.cancel()
        self.resume_writing()
        super().connection_lost(exc)
        self.pipeline.clear()
        for call in self._owed:  # uvicorn tells the one that was read last
            self._let_go(call)
        self._owed.clear()

    def _let_go(self, call: Any) -> None:
        """Tells what answers a request that nobody waits for its reply."""
        if call.response_complete:
            return
        call.disconnected = True
        if not isinstance(call, DirectCall):
            call.message_event.set()
        elif call.task is not None:
            call.task.cancel()
        else:
            self._answer(call)  # counts it

    def pause_writing(self) -> None:
        """A client does not read its replies."""
        super().pause_writing()
        self._give_up_soon()

    def resume_writing(self) -> None:
        """It does again, or has gone."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        super().timeout_keep_alive_handler()
        self._give_up_soon()

    def shutdown(self) -> None:
        """The server ends."""
        super().shutdown()
        self._give_up_soon()

    def _give_up_soon(self) -> None:
        """Sees to it that what is not read does not keep a connection open for ever."""
        if self._unread is None and self.transport.get_write_buffer_size():
            self._unread = self.loop.call_later(REPLY_S, self.transport.abort)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._unset_keepalive_if_required()  # a reply to the one before may have set it since these bytes came
        self._read_s = self._round.began_s()
        self.scope["state"] = self.app_state | {READ_S: self._read_s}
        if self._head_bytes is None:
            self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """A head is there."""
        self._late.cancel()
        self._head_bytes = None
        self._framing_bytes = 0
        self._refused = self.transport.is_closing()
        if len(self.pipeline) == MOST_PIPELINED:
            self._refuse(HTTPStatus.TOO_MANY_REQUESTS)
            raise HttpParserError  # else the parser would go on with what else has come
        if self.parser.should_upgrade():  # what follows would be of another protocol, so no body could be told from it
            self._refused = True
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        if not self._refused and not self._goes_the_short_way():
            super().on_headers_complete()
            self._owed.append(self.cycle)
            if self.expect_100_continue:  # the reply may come before the body, which then comes or does not
                self.cycle.keep_alive = False
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        """A part of a body, which nobody waits for if it was refused."""
        self._framing_bytes -= len(body)
        if self._refused:
            return
        if not isinstance(call := self.cycle, DirectCall):
            super().on_body(body)
        elif call.task is None:
            call.content += body
            if len(call.content) > call.most_body:
                self._answer(call)

    def on_message_complete(self) -> None:
        """A body is there."""
        self._late.cancel()
        self._in_body = False
        if self._refused or self.cycle.response_complete:
            self._rest()
        elif not isinstance(call := self.cycle, DirectCall):
            self.scope["state"][READ_S] = self._round.began_s()
            super().on_message_complete()
        elif call.task is None:
            call.read_s = self._round.began_s()
            self._answer(call)

    def data_received(self, data: bytes) -> None:
        """Counts what comes of a head that is not complete; waits for what has not come of head or body."""
        if self._last_words is not None:
            return
        if self._head_bytes is not None:
            self._head_bytes += len(data)  # none again where the head ends in it, 0 where the next one begins in it
        if self._in_body:
            self._framing_bytes += len(data)
        super().data_received(data if self._in_body else without_upgrade(data))
        if (self._head_bytes or 0) > MOST_HEAD_BYTES or (self._in_body and self._framing_bytes > MOST_FRAMING_BYTES):
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif self._head_bytes is not None or self._in_body:
            if self._late.cancelled() and not self.transport.is_closing():
                after_s = BODY_S if self._in_body else HEAD_S
                self._late = self.loop.call_later(after_s, self._time_out, after_s)
        elif self._rests() and self.timeout_keep_alive_task is None:
            self._rest()  # a line's end between two requests begins none

    def _rests(self) -> bool:
        """Whether nothing is being read or answered."""
        answered = self.cycle is None or self.cycle.response_complete
        return self._head_bytes is None and not self._in_body and answered

    def _goes_the_short_way(self) -> bool:
        """Takes or refuses a request that can be answered from here, where no other is being answered."""
        way = self._short_way
        free = (self.cycle is None or self.cycle.response_complete) and not self.flow.write_paused
        if way is None or not free or self.url not in way.answers or self.parser.get_method() != b"POST":
            return False
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        call = DirectCall(
            self.headers, self._read_s, way.answers[self.url], most_body=way.most_body, keep_alive=keep_alive
        )
        if (reply := way.refusal(call)) is not None:
            self._refused = True
            self._write(reply, keep_alive=keep_alive and not self.expect_100_continue)
            self.server_state.total_requests += 1
            return True
        if self.expect_100_continue:
            return False
        self.cycle = call
        self._owed.append(call)
        return True

    def _answer(self, call: DirectCall) -> None:
        call.task = self.loop.create_task(self._answered(call))
        self.tasks.add(call.task)
        call.task.add_done_callback(self.tasks.discard)

    async def _answered(self, call: DirectCall) -> None:
        try:
            reply = await call.answer(call)
        except Exception:  # a mistake of ours: nobody is left waiting for it
            self.logger.exception("a request could not be answered")
            reply = FAILED
        except BaseException:
            self.transport.close()
            raise
        if not self.transport.is_closing():
            call.response_started = call.response_complete = True
            self._send(reply, keep_alive=call.keep_alive)

    def _send(self, reply: Reply, *, keep_alive: bool) -> None:
        self._write(reply, keep_alive=keep_alive)
        self.on_response_complete()

    def _write(self, reply: Reply, *, keep_alive: bool) -> None:
        says_so = reply.headers.get("connection") == "close"
        closing = [] if keep_alive or says_so else [(b"connection", b"close")]
        self.transport.write(reply.message([*self.server_state.default_headers, *closing]))
        if says_so or not keep_alive:
            self.transport.close()
            self._give_up_soon()

    def _rest(self) -> None:
        """Waits for the next request, where the reply came before the end of the body."""
        self._unset_keepalive_if_required()
        if not self.transport.is_closing() and self._last_words is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """A reply was sent; the last one that is owed ends a connection that was refused."""
        if self._owed:
            self._owed.popleft()
        super().on_response_complete()
        if self._last_words is not None and not self._owed and not self.transport.is_closing():
            self.transport.write(self._last_words)
            self.transport.close()
        if self.transport.is_closing():
            self._give_up_soon()

    def _time_out(self, after_s: float) -> None:
        """A head or a body takes too long, unless it was the server that stopped reading."""
        if self.flow.read_paused:
            self._late = self.loop.call_later(after_s, self._time_out, after_s)
        else:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)

    def send_400_response(self, msg: str) -> None:
        """Ends the connection where what came is not HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _refuse(self, status: HTTPStatus, why: str = "") -> None:
        """Ends the connection, after the replies that are owed to requests before the one that is read."""
        self._late.cancel()
        if self.transport.is_closing() or self._last_words is not None:
            return
        taken = self._in_body and not self._refused  # the one that is read is among those that are owed a reply
        replied = self._in_body and (self._refused or self.cycle.response_started)
        if taken and self.pipeline:
            self.pipeline.popleft()
            self._owed.pop()
            taken = False
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nconnection: close\r\ncontent-length: {len(why)}\r\n\r\n"
        words = (head + why).encode()
        if len(self._owed) > taken:
            self._last_words = words
            return
        if taken and isinstance(call := self.cycle, DirectCall):
            call.ended = status
        elif taken:
            self.scope["state"][ENDED] = status
        if not replied:
            self.transport.write(words)
        self.transport.close()
        self._give_up_soon()
