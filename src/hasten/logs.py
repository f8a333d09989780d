"""Logs of the command line: lines on stderr, for people or for a machine to read."""

from __future__ import annotations

import logging

from pythonjsonlogger.json import JsonFormatter

NAMES = {"asctime": "time", "levelname": "level", "name": "logger"}
FORMAT = "%(levelname)s %(name)s: %(message)s"


def log_to_stderr(level: int) -> None:
    """Logs to stderr, unless something is set up already.

    Args:
        level: Lowest level that is shown, of `logging`.
    """
    logging.basicConfig(level=level, format=FORMAT)


def log_as_server(level: int, *, json: bool) -> None:
    """Logs as a server does, in each of its processes.

    Args:
        level: Lowest level that is shown of others' loggers; of hasten's own it is `INFO`.
        json: Whether each line is a JSON object.
    """
    log_to_stderr(level)
    logging.getLogger("hasten").setLevel(logging.INFO)
    if json:
        log_as_json()


def log_as_json() -> None:
    """Makes every line of the root logger's handlers one JSON object: `time`, `level`, `logger`, `message`.

    What a record has besides, such as `request_id` and `exc_info`, is there by its own name.
    """
    formatter = JsonFormatter("{asctime}{levelname}{name}{message}", style="{", rename_fields=NAMES)
    formatter.default_time_format, formatter.default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03d"
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
