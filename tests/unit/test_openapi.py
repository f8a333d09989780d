"""The API as its OpenAPI document has it: a client made from that document finds nothing that it does not say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate
from serving import live, make_app, visit
from starlette.routing import Route
from test_page import needs_browser, shown

RULES = Path(__file__).with_name("schemathesis.toml")


def fetched(path: str) -> Any:
    return visit(lambda client: client.get(path))


def test_the_document_is_valid_and_names_every_route() -> None:
    document = fetched("/openapi.json").json()
    validate(document)
    versioned = re.compile(r"/versions/|^/docs|^/openapi.json")
    paths = [route.path for route in make_app().routes if isinstance(route, Route)]
    assert set(document["paths"]) == {path for path in paths if not versioned.search(path)}


def test_a_client_made_from_the_document_finds_nothing_it_does_not_say(tmp_path: Path) -> None:
    with live(make_app()) as url:
        command = ["schemathesis.cli", "--config-file", str(RULES), "run", f"{url}/openapi.json", "--seed", "1"]
        options = [
            "--max-examples",
            "10",
            "--generation-database",
            "none",
            "--no-color",
            "--suppress-health-check",
            "all",
        ]
        run = subprocess.run(
            [sys.executable, "-m", *command, *options],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
            check=False,
        )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr
    assert "11 selected" in run.stdout


@pytest.mark.parametrize(
    "path", ["/docs", "/docs/start.js", "/docs/ui/swagger-ui.css", "/docs/ui/swagger-ui-bundle.js"]
)
def test_the_page_comes_from_here_alone(path: str) -> None:
    found = fetched(path)
    assert found.status_code == 200
    if path == "/docs":
        assert "script-src 'self';" in found.headers["content-security-policy"]
        assert all(not link.startswith(("http", "/")) for link in re.findall(r'(?:src|href)="([^"]*)"', found.text))


@needs_browser
def test_a_browser_shows_the_operations(tmp_path: Path) -> None:
    with live(make_app()) as url:
        dom = shown(f"{url}/docs", tmp_path)
    assert 'id="operations-default-post_predict"' in dom
    assert "Unable to render" not in dom
