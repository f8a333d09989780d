"""The process that serves, or several on one port: what listens, what signals do, and who watches.

Several processes accept from one listening socket. Each loads the folder itself, so one that ends takes nothing of the
others with it, and another takes its place. SIGHUP is handed on to every process, and each reloads as a single one
does: no connection is closed, where uvicorn would put new processes in the place of old ones. Their metrics are one:
each keeps its own in a folder that they share, and any of them tells what all together count (the multiprocess mode of
prometheus_client).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.config import STARTUP_FAILURE
from uvicorn.lifespan.on import LifespanOn
from uvicorn.supervisors import Multiprocess

from hasten.connection import Connection
from hasten.errors import ArtifactError, HastenError, UsageError
from hasten.serve_options import ServeOptions
from hasten.server import open_app
from hasten.server_metrics import SHARED
from hasten.variant import open_variant

DRAIN_S = 30
READY_S = 1  # to say that it is ready
HEALTH_S = 10  # to say that it is alive, or to be ready for a signal; a process that stands still is replaced

_log = logging.getLogger(__name__)


def serve(folder: Path | str, options: ServeOptions, set_up_logs: Callable[[], None] | None = None) -> None:
    """Serves a variant folder until SIGINT or SIGTERM, then finishes the requests that were admitted.

    SIGHUP loads the folder anew beside what serves; requests that are there already are answered by the old one. If the
    new one fails its checks, the old one stays.

    Args:
        folder: The variant.
        options: Where to listen, processes, threads, limits.
        set_up_logs: Sets up logging in each of several processes, and can be pickled; None leaves it as Python has it.

    Raises:
        ArtifactError: The folder is incomplete, altered or cannot be loaded, or the server does not start.
        MissingExtraError: Traces are asked for, and their extra is not installed.
        ParityError: This machine computes other logits than those recorded when the folder was made.
        UsageError: A limit is below 1, or the address cannot be listened on.
    """
    # The port is taken first, so that a wrong one fails before a model is loaded; it answers when an app is ready.
    with _bound(options) as listener:
        if options.processes == 1:
            started = _serve_alone(folder, options, listener)
        else:
            started = _serve_together(folder, options, listener, set_up_logs)
    if not started:
        raise ArtifactError(f"{folder}: the server did not start; the log above tells why")


def _serve_alone(folder: Path | str, options: ServeOptions, listener: socket.socket) -> bool:
    server = _Server(_Config(folder, options))
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        server.run(sockets=[listener])
    return server.started


def _serve_together(
    folder: Path | str, options: ServeOptions, listener: socket.socket, set_up_logs: Callable[[], None] | None
) -> bool:
    open_variant(folder)  # what is wrong with it is said once
    with _folder_of_metrics() as metrics:
        os.environ[SHARED] = metrics
        try:
            supervisor = _Supervisor(_ProcessConfig(folder, options, set_up_logs), [listener])
            supervisor.run()
        finally:
            del os.environ[SHARED]
    return all(one.exitcode != STARTUP_FAILURE for one in supervisor.processes)


def _folder_of_metrics() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="hasten-metrics-")
    except OSError as error:
        raise UsageError(f"several processes need a folder for their metrics: {error}; name one by TMPDIR") from error


class _Config(uvicorn.Config):
    """How a process serves: its app, made when the process begins, and uvicorn's settings."""

    def __init__(self, folder: Path | str, options: ServeOptions) -> None:
        self._folder, self._options = folder, options
        super().__init__(
            open_app, loop="uvloop", http=Connection, ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_graceful_shutdown=DRAIN_S,
            timeout_worker_healthcheck=HEALTH_S, workers=options.processes,
        )  # fmt: skip

    def load(self) -> None:
        """Opens the folder, and again on SIGHUP; called in a running event loop.

        Raises:
            HastenError: What `open_app` raises.
        """
        loop, early = asyncio.get_running_loop(), list[None]()
        loop.add_signal_handler(signal.SIGHUP, early.append, None)  # which would end a process that is not ready for it
        self.app = app = open_app(self._folder, self._options)
        super().load()
        loop.add_signal_handler(signal.SIGHUP, app.state.reload)
        if early:
            app.state.reload()


class _Server(uvicorn.Server):
    """Says where it listens, once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            _say_where(sockets or [])


class _ProcessConfig(_Config):
    """How one of several processes serves.

    Args:
        folder: The variant.
        options: Limits.
        set_up_logs: Called first in each process.

    Attributes:
        standing: Whether all processes have served once. Until then one that cannot start stops all; afterwards it is
            started again, and the others go on.
    """

    def __init__(self, folder: Path | str, options: ServeOptions, set_up_logs: Callable[[], None] | None) -> None:
        super().__init__(folder, options)
        self.standing, self._set_up_logs = False, set_up_logs

    def load(self) -> None:
        """Opens the folder; what is wrong with it becomes an exit status."""
        if self._set_up_logs is not None:
            self._set_up_logs()
        try:
            super().load()
        except HastenError as error:
            _log.error("%s", error)
            sys.exit(error.exit_status if self.standing else STARTUP_FAILURE)
        if self.standing:
            self.lifespan_class = _LifespanOfOne
        _end_with_the_parent()


def _end_with_the_parent() -> None:
    """Ends this process as SIGTERM does once the one that started it is gone, which would hold the port unwatched."""
    loop, parent = asyncio.get_running_loop(), multiprocessing.parent_process()
    if parent is None:
        return
    gone = parent.sentinel

    def end() -> None:
        loop.remove_reader(gone)
        _log.error("the process that watches this one ended")
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(gone, end)


class _LifespanOfOne(LifespanOn):
    """Of a process in another's place: if its warm-up fails, the status is not that by which uvicorn would end all."""

    async def startup(self) -> None:
        await super().startup()
        if self.should_exit:
            sys.exit(HastenError.exit_status)


class _Supervisor(Multiprocess):
    """Starts the processes, watches them, hands signals on."""

    config: _ProcessConfig

    def __init__(self, config: _ProcessConfig, sockets: list[socket.socket]) -> None:
        super().__init__(config, sockets)
        self._to_reload = set[int | None]()

    def keep_subprocess_alive(self) -> None:
        if not self.config.standing and all(one.process.is_alive() and one.is_ready() for one in self.processes):
            self.config.standing = True
            _say_where(self.sockets)
        before = {one.pid: one for one in self.processes}
        super().keep_subprocess_alive()
        for pid in before.keys() - {one.pid for one in self.processes}:
            _log.error("process %s ended (exit status %s); another takes its place", pid, before[pid].exitcode)
            mark_process_dead(pid)  # of its gauges; what it counted stays counted
        self._hand_on()

    def handle_hup(self) -> None:
        self._to_reload = {one.pid for one in self.processes}
        self._hand_on()

    def _hand_on(self) -> None:
        """Tells those to reload that are owed it and have come so far that they can."""
        for one in self.processes:
            if one.pid in self._to_reload and one.process.is_alive() and one.is_ready(READY_S):
                os.kill(one.pid or 0, signal.SIGHUP)
                self._to_reload.discard(one.pid)

    def terminate_all(self) -> None:
        super().terminate_all()
        for listener in self.sockets:  # else the port would still take connections that nobody answers
            listener.close()


def _say_where(listeners: list[socket.socket]) -> None:
    for listener in listeners:
        host, port = listener.getsockname()[:2]
        _log.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)


def _bound(options: ServeOptions) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UsageError(f"cannot listen on {options.host}, port {options.port}: {error}; choose others") from error
    return listener
