"""Logs for a machine to read."""

from __future__ import annotations

import logging

from pythonjsonlogger.json import JsonFormatter

NAMES = {"asctime": "time", "levelname": "level", "name": "logger"}


def log_as_json() -> None:
    """Makes every line of the root logger's handlers one JSON object: `time`, `level`, `logger`, `message`.

    What a record has besides, such as `request_id` and `exc_info`, is there by its own name.
    """
    formatter = JsonFormatter("{asctime}{levelname}{name}{message}", style="{", rename_fields=NAMES)
    formatter.default_time_format, formatter.default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03d"
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
