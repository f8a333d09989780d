"""What `deploy/` says about the server is true of it."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from serving import make_app, visit

from hasten.processes import DRAIN_S
from hasten.serve_options import ServeOptions
from hasten.server_metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/hasten.json").read_text(encoding="utf-8"))
MANIFESTS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in DEPLOY.glob("kubernetes/*.yaml")}
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))
POD = MANIFESTS["deployment"]["spec"]["template"]["spec"]


def exported() -> set[str]:
    """The series that the server can give, those with labels included."""
    metrics = Metrics()
    metrics.serves({"name": "a", "digest": "b"})
    metrics.tokens_of("x").inc()
    for counter in (metrics.requests, metrics.refusals, metrics.reloads):
        counter.labels("x").inc()
    return set(re.findall(r"^(hasten_\w+)", metrics.text().decode(), re.MULTILINE))


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_a_panel_asks_for_series_that_exist(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        asked = set(re.findall(r"hasten_\w+", target["expr"]))
        assert asked
        assert asked <= exported()


@pytest.mark.parametrize("rule", ALERTS["groups"][0]["rules"], ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_series_that_exist(rule: dict[str, Any]) -> None:
    assert set(re.findall(r"hasten_\w+", rule["expr"])) <= exported()
    assert 'job="hasten"' in rule["expr"]
    assert rule["annotations"]["summary"]


def test_prometheus_loads_the_alerts() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    assert settings["rule_files"] == ["alerts.yml"]
    assert settings["scrape_configs"][0]["job_name"] == "hasten"
    assert "./alerts.yml:/etc/prometheus/alerts.yml:ro" in COMPOSE["services"]["prometheus"]["volumes"]


def test_panels_do_not_lie_on_each_other() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places) == len(set(places))


def test_the_autoscaler_goes_by_a_series_that_exists() -> None:
    (metric,) = MANIFESTS["autoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in exported()
    assert MANIFESTS["autoscaler"]["spec"]["scaleTargetRef"]["name"] == MANIFESTS["deployment"]["metadata"]["name"]


(CONTAINER,) = POD["containers"]
PROBES = {name: probe["httpGet"]["path"] for name, probe in CONTAINER.items() if name.endswith("Probe")}


@pytest.mark.parametrize("path", PROBES.values(), ids=PROBES)
def test_a_probe_asks_what_a_ready_server_answers_with_200(path: str) -> None:
    assert visit(lambda client: client.get(path)).status_code == 200


def test_the_live_probe_passes_a_server_that_is_not_ready() -> None:
    async def script() -> tuple[int, ...]:
        transport = httpx.ASGITransport(make_app())  # its lifespan does not run
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return tuple([(await client.get(PROBES[f"{kind}Probe"])).status_code for kind in ("liveness", "readiness")])

    assert asyncio.run(script()) == (200, 503)


def test_there_is_time_to_finish_what_was_admitted() -> None:
    before_s = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] > DRAIN_S + before_s
    assert int(COMPOSE["services"]["hasten"]["stop_grace_period"].removesuffix("s")) > DRAIN_S


def test_every_port_is_the_servers() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"][0]
    wanted = ServeOptions().port
    assert CONTAINER["ports"][0]["containerPort"] == wanted
    assert scraped["static_configs"][0]["targets"] == [f"hasten:{wanted}"]
    assert f"EXPOSE {wanted}\n" in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def test_what_compose_mounts_is_there() -> None:
    for name in ("prometheus", "grafana"):
        for volume in COMPOSE["services"][name]["volumes"]:
            assert (DEPLOY / volume.split(":")[0]).exists()


def test_what_kustomize_lists_is_there() -> None:
    assert set(MANIFESTS["kustomization"]["resources"]) == {f"{stem}.yaml" for stem in MANIFESTS} - {
        "kustomization.yaml"
    }
