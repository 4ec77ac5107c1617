"""compose.yaml against the Compose specification and against rules of ours, each shown to fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from tests.deploy.charts import HERE, ROOT

DOCKER = ROOT / "docker"
RUN_BY_HAND = {"perf"}  # writes reports where it is started


def problems(services: dict[str, Any]) -> Iterator[str]:
    """What is wrong with services."""
    for name, service in services.items():
        if service.get("cap_drop") != ["ALL"]:
            yield f"{name} keeps capabilities"
        if not service.get("read_only") and name not in RUN_BY_HAND:
            yield f"{name} can write to its root file system"
        if "no-new-privileges:true" not in service.get("security_opt", []):
            yield f"{name} may gain privileges"
        if not service.get("mem_limit"):
            yield f"{name} has no memory limit"
        if service["image"].partition(":")[2] in ("", "latest"):
            yield f"{name} runs {service['image']}, expected a fixed tag"
        for port in service.get("ports", []):
            if not port.startswith("127.0.0.1:"):
                yield f"{name} publishes {port} to the network"


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["services"]


def test_all_files_are_valid_compose() -> None:
    names = PyCompose.from_yaml((DOCKER / "compose.yaml").read_text()).service_names()
    assert set(names) == {"server", "prometheus", "grafana", "perf"}
    for name, services in (("compose.gpu.yaml", ["server"]), ("compose.auth.yaml", ["auth"])):
        assert PyCompose.from_yaml((DOCKER / name).read_text()).service_names() == services


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("shm_size: 2gb", "shm_size: [2]"), "shm_size"),
        (("read_only: true", "readonly: true"), "readonly"),
        (("ports:", "ports: 8001\n    x-ports:"), "ports"),
    ],
)
def test_the_specification_can_refuse(change: tuple[str, str], says: str) -> None:
    text = (DOCKER / "compose.yaml").read_text().replace(*change, 1)
    with pytest.raises(ValueError, match=says):
        PyCompose.from_yaml(text)


def test_the_services_keep_the_rules() -> None:
    for name in ("compose.yaml", "compose.auth.yaml"):
        assert list(problems(load(DOCKER / name))) == []


def test_each_rule_can_fail() -> None:
    said = list(problems(load(HERE / "broken" / "compose.yaml")))
    assert said == [
        "root keeps capabilities",
        "writable can write to its root file system",
        "gains may gain privileges",
        "unlimited has no memory limit",
        "floating runs a, expected a fixed tag",
        "public publishes 8001:8001 to the network",
    ]


def test_the_server_gets_what_it_needs() -> None:
    server = load(DOCKER / "compose.yaml")["server"]
    assert server["shm_size"] == "2gb"
    assert set(server["ulimits"]) == {"memlock", "stack", "nofile"}
    exit_s = int(server["environment"]["PANOTRITON_EXIT_TIMEOUT_S"])
    assert int(server["stop_grace_period"].removesuffix("s")) > exit_s


def test_every_mounted_file_exists() -> None:
    for service in load(DOCKER / "compose.yaml").values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), source


def test_perf_analyzer_starts_only_when_named() -> None:
    assert load(DOCKER / "compose.yaml")["perf"]["profiles"] == ["perf"]
