"""The chart: every variant against three releases' schemas and all policies; each check shown to fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.deploy import charts, policies
from tests.deploy.charts import CHART, HERE, RELEASES, VARIANTS, Manifest, helm, render, rendered

FAULTS = yaml.safe_load((HERE / "broken" / "manifests.yaml").read_text())
BAD_VALUES = yaml.safe_load((HERE / "broken" / "values.yaml").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_valid_kubernetes(variant: str) -> None:
    for release in RELEASES:
        for manifest in json.loads(rendered(variant, release)):
            assert charts.schema_problems(manifest, release) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_keeps_the_policies(variant: str) -> None:
    assert policies.problems(json.loads(rendered(variant))) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault['policy']}-{fault['says']}")
def test_each_check_can_fail(fault: dict[str, Any]) -> None:
    manifests = json.loads(rendered(fault.get("variant", "default")))
    broken = break_it(manifests, fault)
    if fault["policy"] == "schema":
        complaints = charts.schema_problems(broken, RELEASES[-1])
    else:
        complaints = list(policies.POLICIES[fault["policy"]](manifests))
    assert any(fault["says"] in complaint for complaint in complaints), complaints


def break_it(manifests: list[Manifest], fault: dict[str, Any]) -> Manifest:
    """Put one fault into the manifests; returns the one that now has it."""
    kind, *path = fault["at"].split(".")
    manifest = next(manifest for manifest in manifests if manifest["kind"] == kind)
    node: Any = manifest
    for key in path[:-1]:
        node = node[int(key)] if key.isdigit() else node[key]
    if "set" in fault:
        node[path[-1]] = fault["set"]
    else:
        del node[path[-1]]
    return manifest


def test_every_policy_has_a_fault() -> None:
    assert {fault["policy"] for fault in FAULTS} == {"schema", *policies.POLICIES}


@pytest.mark.parametrize("bad", BAD_VALUES, ids=lambda bad: bad["says"])
def test_wrong_values_are_refused_with_the_reason(bad: dict[str, Any]) -> None:
    done = helm("template", "prod", str(CHART), values=bad["values"])
    assert done.returncode != 0
    assert bad["says"] in done.stderr


def test_helm_finds_nothing_to_complain_about() -> None:
    done = helm("lint", "--strict", str(CHART), values={})
    assert done.returncode == 0, done.stdout


def test_an_old_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match="incompatible with Kubernetes"):
        render({}, release="1.29")


def server_container(values: dict[str, Any]) -> Manifest:
    (deployment,) = (m for m in render(values) if m["kind"] == "Deployment")
    return deployment["spec"]["template"]["spec"]["containers"][0]


def test_the_start_may_take_as_long_as_the_values_say() -> None:
    for seconds in (30, 900, 3601):
        probe = server_container({"startup": {"timeoutSeconds": seconds}})["startupProbe"]
        assert seconds <= probe["failureThreshold"] * probe["periodSeconds"] < seconds + 5


def test_limits_carry_the_gpu_or_none() -> None:
    assert server_container({})["resources"]["limits"]["nvidia.com/gpu"] == 1
    mig = server_container(VARIANTS["mig"])["resources"]["limits"]
    assert mig["nvidia.com/mig-3g.40gb"] == 1
    assert "nvidia.com/gpu" not in mig
    assert not [
        k for k in server_container(VARIANTS["cpu"])["resources"]["limits"] if "nvidia" in k
    ]


def test_secrets_come_by_reference_only() -> None:
    for variant in ("s3", "gcs", "observed"):
        manifests = json.loads(rendered(variant))
        assert not [manifest for manifest in manifests if manifest["kind"] == "Secret"]
    assert server_container(VARIANTS["s3"])["envFrom"] == [{"secretRef": {"name": "s3"}}]


def test_the_job_runs_all_shards_at_once_and_sends_to_every_replica() -> None:
    values = {"job": VARIANTS["job"]["job"] | {"shards": 3}}
    (job,) = (m for m in render(values) if m["kind"] == "Job")
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 3)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert "--server=prod-panotriton-headless.pano.svc:8001" in container["args"]
