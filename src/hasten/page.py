"""The page at `/`: one file, without anything from elsewhere, that asks `/predict` and reads `/metrics`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.responses import Response

POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def _html() -> str:
    return files("hasten").joinpath("templates/page.html").read_text(encoding="utf-8")


def page() -> Response:
    """The page; it may load nothing and ask nobody but the server that it is from."""
    headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    headers |= {"vary": "accept"}  # the same address answers programs in JSON
    return Response(_html(), headers=headers, media_type="text/html")
