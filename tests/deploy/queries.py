"""PromQL: the metrics that an expression reads, and where the project has expressions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

from tests.deploy.charts import ROOT, Manifest

# Grafana and Prometheus adapter put text in before Prometheus sees a query.
_PLACEHOLDERS = {
    "$__rate_interval": "1m",
    "$instance": ".*",
    "<<.LabelMatchers>>": 'namespace="n"',
    "<<.GroupBy>>": "pod",
}
# Metrics that a server on a machine without a GPU does not have: docs/user_guide/metrics.md of
# triton-inference-server/server, section GPU Metrics. `up` is Prometheus's own.
ELSEWHERE = {
    "nv_gpu_utilization": {"gpu_uuid"},
    "nv_gpu_memory_total_bytes": {"gpu_uuid"},
    "nv_gpu_memory_used_bytes": {"gpu_uuid"},
    "nv_gpu_power_usage": {"gpu_uuid"},
    "up": set[str](),
}
# Labels that a scrape adds to every metric.
_SCRAPED = {"instance", "job", "namespace", "pod"}

Served = dict[str, set[str]]


def served_metrics(text: str) -> Served:
    """Names of a /metrics page, each with its labels."""
    found: Served = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, labels = line.partition("{")
            found.setdefault(name.split()[0], set()).update(re.findall(r"(\w+)=", labels))
    return found


def problems(query: str, served: Served) -> Iterator[str]:
    """What is wrong with a query: its grammar, a metric nobody serves, a label that it never has."""
    for placeholder, value in _PLACEHOLDERS.items():
        query = query.replace(placeholder, value)
    try:
        tree = promql_parser.parse(query)
    except ValueError as error:
        yield f"{query}: {error}"
        return
    known = served | ELSEWHERE
    read = list(_selectors(tree))
    if not read:
        yield f"{query}: reads no metric"
    for name, labels in read:
        if name not in known:
            yield f"{query}: no server has {name}"
        elif unknown := labels - known[name] - _SCRAPED:
            yield f"{query}: {name} has no label {', '.join(sorted(unknown))}"
    yield from _bare_divisions(tree, query)


def _bare_divisions(tree: Any, query: str) -> Iterator[str]:
    """A rate below a fraction bar is 0 when nothing happens: it needs a floor."""
    for node in _nodes(tree):
        if isinstance(node, promql_parser.BinaryExpr) and str(node.op) == "/":
            below = node.rhs
            floored = isinstance(below, promql_parser.Call) and below.func.name == "clamp_min"
            rates = [n for n in _nodes(below) if _is_rate(n)]
            if rates and not floored:
                yield f"{query}: divides by a rate without clamp_min"


def _is_rate(node: Any) -> bool:
    return isinstance(node, promql_parser.Call) and node.func.name in ("rate", "increase", "delta")


def _selectors(tree: Any) -> Iterator[tuple[str, set[str]]]:
    for node in _nodes(tree):
        if isinstance(node, promql_parser.VectorSelector):
            yield str(node.name), {matcher.name for matcher in node.matchers.matchers}


def _nodes(node: Any) -> Iterator[Any]:
    """A node and all below it."""
    yield node
    for name in ("lhs", "rhs", "expr", "vs", "vector_selector", "param"):
        if (child := getattr(node, name, None)) is not None:
            yield from _nodes(child)
    for child in getattr(node, "args", None) or ():
        yield from _nodes(child)


def of_dashboard(path: Path) -> list[str]:
    """Every panel's expressions, and those of variables."""
    dashboard = json.loads(path.read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [
        re.sub(r"label_values\((\w+),.*", r"\1", variable["query"]["query"])
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]
    return panels + variables


def of_alerts(path: Path) -> list[str]:
    groups = yaml.safe_load(path.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def of_adapter() -> list[str]:
    """Series and metric queries of Prometheus adapter's rules."""
    rules = yaml.safe_load((ROOT / "docker/prometheus/adapter-rules.yml").read_text())["rules"]
    return [rule[key] for rule in rules["custom"] for key in ("seriesQuery", "metricsQuery")]


def of_scaler(manifests: list[Manifest]) -> list[str]:
    """Queries of the chart's ScaledObject."""
    (scaler,) = (m for m in manifests if m["kind"] == "ScaledObject")
    return [trigger["metadata"]["query"] for trigger in scaler["spec"]["triggers"]]
