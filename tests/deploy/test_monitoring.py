"""Every query of dashboard, alerts and autoscalers, resolved against the metrics of a running server."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
import yaml

from panotriton.groups.dataset import Summary
from panotriton.groups.maker import Outcome
from panotriton.groups.progress import Progress, Usage, exposed
from panotriton.groups.replicas import Servers
from panotriton.server.health import answer_probes
from panotriton.server.launch import LocalServer
from panotriton.server.supervise import Supervisor
from tests.deploy import queries
from tests.deploy.charts import HERE, ROOT, rendered, server_models
from tests.deploy.queries import Served

DASHBOARD = ROOT / "docker/chart/files/dashboards/panotriton.json"
ALERTS = ROOT / "docker/chart/files/alerts.yml"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """The metrics of a server with the flags that the entrypoint gives it."""
    models, flags = ["decode", "select"], ["--metrics-config=summary_latencies=true"]
    with LocalServer(ROOT / "model_repository", load_models=models, extra_args=flags) as server:
        supervisor = Supervisor(server, drain_s=1.0)
        with answer_probes(supervisor, "127.0.0.1", 0) as port:
            own = metrics_page(f"http://127.0.0.1:{port}/metrics")
        yield queries.served_metrics(metrics_page(server.metrics_url) + own + run_metrics())


def run_metrics() -> str:
    """Of a data-set run that has made a group."""
    progress = Progress(10, None)
    progress.usage = Usage(Servers(["127.0.0.1:1"]))
    progress.update(Summary(1, 0, 3, 5, complete=False), Outcome(0, kept=3, bytes=1000))
    with exposed(progress, 0) as port:
        return metrics_page(f"http://127.0.0.1:{port}/metrics")


def metrics_page(url: str) -> str:
    """The page; Triton opens its port a moment after it says that it is ready."""
    deadline = time.monotonic() + 10
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return str(reply.read().decode())
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.mark.parametrize("query", queries.of_dashboard(DASHBOARD))
def test_the_dashboard_shows_what_the_server_has(query: str, served: Served) -> None:
    assert list(queries.problems(query, served)) == []


@pytest.mark.parametrize("query", queries.of_alerts(ALERTS))
def test_the_alerts_read_what_the_server_has(query: str, served: Served) -> None:
    assert list(queries.problems(query, served)) == []


def test_the_autoscalers_read_what_the_server_has(served: Served) -> None:
    for query in queries.of_adapter() + queries.of_scaler(json.loads(rendered("keda"))):
        assert list(queries.problems(query, served)) == []


def test_a_query_can_fail(served: Served) -> None:
    said = [
        " ".join(queries.problems(query, served))
        for path, read in ((HERE / "broken/alerts.yml", queries.of_alerts),)
        for query in read(path)
    ]
    said += [
        " ".join(queries.problems(query, served))
        for query in queries.of_dashboard(HERE / "broken/dashboard.json")
    ]
    wanted = (
        "no server has nv_inference_requests_success",
        "has no label modell",
        "unclosed left parenthesis",
        "reads no metric",
        "without clamp_min",
        "no server has nv_gpu_temperature",
        "invalid promql query",
        "no server has nv_inference_pending",
    )
    for words, complaint in zip(wanted, said, strict=True):
        assert words in complaint


def test_the_listed_gpu_metrics_are_indeed_not_served_here(served: Served) -> None:
    """The list of exceptions holds nothing that could be checked for real."""
    assert not set(queries.ELSEWHERE) & set(served)


def test_the_scaled_models_are_steps_of_the_pipeline() -> None:
    values = yaml.safe_load((ROOT / "docker/chart/values.yaml").read_text())
    assert set(values["autoscaling"]["models"].split("|")) <= server_models()


def test_adapter_and_autoscaler_agree_on_names() -> None:
    rules = yaml.safe_load((ROOT / "docker/prometheus/adapter-rules.yml").read_text())["rules"]
    offered = {rule["name"]["as"] for rule in rules["custom"]}
    manifests = json.loads(rendered("hpa")) + json.loads(rendered("two-pools"))
    scalers = [m["spec"] for m in manifests if m["kind"] == "HorizontalPodAutoscaler"]
    asked = {m["pods"]["metric"]["name"] for scaler in scalers for m in scaler["metrics"]}
    assert asked == offered


def test_prometheus_scrapes_the_composed_server_and_loads_the_alerts() -> None:
    config = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
    targets = [t for job in config["scrape_configs"] for t in job["dns_sd_configs"]]
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    assert {name for target in targets for name in target["names"]} <= set(services)
    mounts = " ".join(services["prometheus"]["volumes"])
    assert all(f":{path}:ro" in mounts for path in config["rule_files"])
    assert (
        config["scrape_configs"][0]["job_name"]
        in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"][0]["expr"]
    )


def test_no_alert_goes_silent_on_a_mig_slice() -> None:
    """There the server has no metrics of its GPU, and what reads a missing series never fires."""
    assert not [query for query in queries.of_alerts(ALERTS) if "nv_gpu_" in query]


def test_the_chart_carries_alerts_and_dashboard() -> None:
    manifests = {manifest["kind"]: manifest for manifest in json.loads(rendered("observed"))}
    rule = manifests["PrometheusRule"]
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    dashboards = [
        m for m in json.loads(rendered("observed")) if "panotriton.json" in m.get("data", {})
    ]
    (dashboard,) = dashboards
    assert json.loads(dashboard["data"]["panotriton.json"]) == json.loads(DASHBOARD.read_text())
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_every_alert_says_what_to_do() -> None:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("info", "warning", "critical")
            assert rule["annotations"]["summary"]
            assert rule["annotations"]["description"]
