"""The page at `/`, as it comes and as a real browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from serving import OPTIONS, expected, live, make_app, visit

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")


def test_a_browser_gets_a_page_and_others_what_this_is() -> None:
    html = visit(lambda client: client.get("/", headers={"accept": "text/html,*/*;q=0.8"}))
    assert html.headers["content-type"].startswith("text/html")
    assert "default-src 'none'; connect-src 'self'" in html.headers["content-security-policy"]
    assert visit(lambda client: client.get("/")).json()["name"] == "onnx-fp32"


def test_the_page_loads_nothing_from_elsewhere() -> None:
    html = visit(lambda client: client.get("/", headers={"accept": "text/html"})).text
    assert not re.findall(r"https?://|//[a-z]|@import|\burl\(", html.replace("// ", ""))
    assert re.findall(r'(?:src|href)="([^"]*)"', html) == ["data:,"]


def shown(url: str, profile: Path) -> str:
    """The page's elements after three seconds in a headless browser."""
    assert BROWSER is not None
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    command = [BROWSER, *flags, f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@needs_browser
def test_a_browser_shows_the_answer_its_timings_and_what_the_server_does(tmp_path: Path) -> None:
    with live(make_app()) as url:
        dom = shown(f"{url}/?text={quote('a fine <b>day</b>')}", tmp_path)
    wanted = [(row["label"], f"{100 * row['score'].expected:.2f} %") for row in expected("a fine <b>day</b>")]
    assert re.findall(r"<b>(.*?)</b>.*?<span>(.*?)</span>", dom) == wanted
    assert re.search(r"tokenize [\d.]+ ms · queue [\d.]+ ms · inference [\d.]+ ms", dom)
    assert "<title>onnx-fp32</title>" in dom
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?) <small>", dom))
    assert list(tiles) == ["p50", "p95", "p99", "goodput", "refused", "queue"]
    assert (tiles["refused"], tiles["queue"]) == ("0.0", "0.0")


@needs_browser
def test_a_browser_shows_why_a_text_was_refused(tmp_path: Path) -> None:
    with live(make_app(options=replace(OPTIONS, max_body_bytes=20))) as url:
        dom = shown(f"{url}/?text={quote('much too long for it')}", tmp_path)
    assert '<p class="bad">413: the body is above 20 bytes</p>' in dom
