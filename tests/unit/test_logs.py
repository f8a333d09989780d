from __future__ import annotations

import io
import json
import logging
import re

import pytest

from hasten.logs import log_as_json


def test_a_line_is_an_object_with_what_the_record_has(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    log_as_json()
    logger = logging.getLogger("hasten.server")
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        logger.error("request %s: failed", "a1", exc_info=error, extra={"request_id": "a1"})
    logger.warning("no room")
    first, second = map(json.loads, lines.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}", first.pop("time"))
    assert "ValueError: two\nlines" in first.pop("exc_info")
    assert first == {
        "level": "ERROR", "logger": "hasten.server", "message": "request a1: failed", "request_id": "a1",
    }  # fmt: skip
    assert second["message"] == "no room"
