"""HTTP requests that are sent when they are due, over as many connections as that takes.

What a client does for one request delays the next, and on a small machine it takes from the server too, so this one
does little: requests are made beforehand, llhttp (by httptools) reads the replies, and nothing is scheduled for a
request but where it needs a new connection. Redirects are not followed, nothing is asked twice, and a reply must
tell how long it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any
from urllib.parse import SplitResult, urlsplit

from httptools import HttpParserError, HttpResponseParser

from hasten.errors import UsageError

FAILED = 0
LEAD_S, TIMEOUT_S = 0.1, 30.0
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a request.

    Attributes:
        status: HTTP status; 0 where there was no reply.
        sent_s: Seconds from when it was due until it was sent, or until a connection for it was asked for.
        ended_s: Seconds from when it was due until the end of its reply, or until it failed.
    """

    status: int
    sent_s: float
    ended_s: float


async def post_when_due(
    url: str, bodies: Sequence[bytes], due_s: Sequence[float], headers: Mapping[str, str]
) -> list[Outcome]:
    """Posts each body when it is due, whether or not earlier ones were answered.

    Args:
        url: Where to, `http` or `https`.
        bodies: What is posted, at least one.
        due_s: When each is due, ascending, in seconds from the start.
        headers: Sent with each, beside its host and length.

    Returns:
        One outcome for each body, in order. What has no reply 30 s after the last was due has failed.

    Raises:
        UsageError: The URL has another scheme, no host, or a port that is none.
    """
    parts, target = _target(url)
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    asked = parts._replace(scheme="", netloc="", fragment="", path=parts.path or "/").geturl()
    line = f"POST {asked} HTTP/1.1\r\nhost: {parts.netloc.rpartition('@')[2]}\r\n{head}content-length: "
    sender = _Sender(target, [line.encode() + b"%d\r\n\r\n%b" % (len(body), body) for body in bodies], due_s)
    try:
        async with asyncio.timeout(LEAD_S + due_s[-1] + TIMEOUT_S):
            await sender.run()
    except TimeoutError:
        pass
    finally:
        sender.close()
    return sender.outcomes()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    host: str
    port: int
    secure: bool


def _target(url: str) -> tuple[SplitResult, _Target]:
    wrong = UsageError(f"{url!r} is not where a server is; that looks like http://127.0.0.1:8000")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or PORTS[parts.scheme]
    except (KeyError, ValueError) as error:
        raise wrong from error
    if not host:
        raise wrong
    return parts, _Target(host=host, port=port, secure=parts.scheme == "https")


class _Connection(asyncio.Protocol):
    """One connection, for one request at a time.

    Args:
        idle: Where it waits between requests.
    """

    transport: Any

    def __init__(self, idle: list[_Connection]) -> None:
        self._idle = idle
        self._parser = HttpResponseParser(self)
        self._done: Callable[[int], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, message: bytes, done: Callable[[int], None]) -> None:
        """Sends a request; `done` is told its status, or 0."""
        self._done = done
        self.transport.write(message)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except HttpParserError:
            self.transport.abort()

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # more is to come
            return
        if self._parser.should_keep_alive() and self._done is not None:
            self._idle.append(self)
        else:
            self.transport.close()
        self._end(status)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002, asyncio names it
        if self in self._idle:
            self._idle.remove(self)
        self._end(FAILED)

    def _end(self, status: int) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(status)


class _Sender:
    """All requests of one load.

    Args:
        target: Where they go.
        messages: Each as it is on the wire.
        due_s: When each is due.
    """

    def __init__(self, target: _Target, messages: Sequence[bytes], due_s: Sequence[float]) -> None:
        self._target, self._messages = target, messages
        self._loop = asyncio.get_running_loop()
        began_s = perf_counter() + LEAD_S
        self._due_s = [began_s + due for due in due_s]
        self._sent_s: list[float | None] = [None] * len(messages)
        self._outcomes: list[Outcome | None] = [None] * len(messages)
        self._left = len(messages)
        self._ended = asyncio.Event()
        self._idle: list[_Connection] = []
        self._connections: list[_Connection] = []
        self._dialling = set[asyncio.Task[None]]()

    async def run(self) -> None:
        """Sends all, and waits for all replies."""
        self._send_due(0)
        await self._ended.wait()

    def outcomes(self) -> list[Outcome]:
        """What became of each."""
        for position, outcome in enumerate(self._outcomes):
            if outcome is None:
                self._end(position, FAILED)
        return [outcome for outcome in self._outcomes if outcome is not None]

    def close(self) -> None:
        """Ends what is under way."""
        for task in self._dialling:
            task.cancel()
        for connection in self._connections:
            connection.transport.abort()

    def _send_due(self, position: int) -> None:
        """Sends what is due by now, from a position on, and comes back when the next one is."""
        while position < len(self._messages):
            now_s = perf_counter()
            if (wait_s := self._due_s[position] - now_s) > 0:
                self._loop.call_later(wait_s, self._send_due, position)
                return
            self._sent_s[position] = now_s
            if self._idle:
                self._ask(self._idle.pop(), position)
            else:
                self._dialling.add(task := self._loop.create_task(self._dial(position)))
                task.add_done_callback(self._dialling.discard)
            position += 1

    def _ask(self, connection: _Connection, position: int) -> None:
        connection.ask(self._messages[position], partial(self._end, position))

    async def _dial(self, position: int) -> None:
        target = self._target
        try:
            _, connection = await self._loop.create_connection(
                partial(_Connection, self._idle), target.host, target.port, ssl=target.secure or None
            )
        except OSError:
            self._end(position, FAILED)
        else:
            self._connections.append(connection)
            self._ask(connection, position)

    def _end(self, position: int, status: int) -> None:
        now_s, due_s = perf_counter(), self._due_s[position]
        sent_s = self._sent_s[position] or now_s
        self._outcomes[position] = Outcome(status=status, sent_s=sent_s - due_s, ended_s=now_s - due_s)
        self._left -= 1
        if not self._left:
            self._ended.set()
