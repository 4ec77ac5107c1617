"""The chart: every variant against three releases' schemas and all policies; each check shown to fail."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

import pytest
import yaml

from panotriton.cli import build_parser
from panotriton.server.repository import PLACEABLE
from tests.deploy import charts, golden, policies
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
    kind, _, name = kind.partition("/")
    manifest = next(
        m for m in manifests if m["kind"] == kind and name in ("", m["metadata"]["name"])
    )
    node: Any = manifest
    for key in path[:-1]:
        node = node[int(key)] if key.isdigit() else node[key]
    last = int(path[-1]) if path[-1].isdigit() else path[-1]
    if "set" in fault:
        node[last] = fault["set"]
    else:
        del node[last]
    return manifest


def test_every_policy_has_a_fault() -> None:
    assert {fault["policy"] for fault in FAULTS} == {"schema", *policies.POLICIES}


@pytest.mark.parametrize("bad", BAD_VALUES, ids=lambda bad: bad["says"])
def test_wrong_values_are_refused_with_the_reason(bad: dict[str, Any]) -> None:
    release = f"--kube-version={bad.get('release', RELEASES[-1])}"
    done = helm("template", "prod", str(CHART), release, values=bad["values"])
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


def run_options(arguments: list[str]) -> argparse.Namespace:
    """As the command understands them."""
    return build_parser().parse_args(arguments)


def test_the_job_is_the_command_and_sends_to_every_replica() -> None:
    (container,) = one("Job", VARIANTS["job"])["spec"]["template"]["spec"]["containers"]
    options = run_options(container["args"])
    assert options.url == "dns:///prod-panotriton-headless.pano.svc:8001"
    assert (options.folders, options.output) == (["/input"], "/output/run")
    assert (options.engine, options.sample_n, options.target_n) == ("local", 100, None)
    assert (options.max_failed, options.progress) == (0, "json")


def test_the_ray_job_is_the_same_command_over_its_cluster() -> None:
    spec = one("RayJob", VARIANTS["rayjob"])["spec"]
    name, *arguments = shlex.split(spec["entrypoint"])
    assert name == "panotriton"
    options = run_options(arguments)
    assert (options.engine, options.address, options.target_n) == ("ray", "auto", 1000000)
    assert (options.folders, options.output) == (["s3://in/panoramas"], "s3://out/run")
    assert (options.format, options.license) == ("webdataset", "cc-by-4.0")
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["maxReplicas"] == 25
    assert spec["activeDeadlineSeconds"] == 604800
    metadata = one("RayJob", VARIANTS["rayjob"])["metadata"]
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "datasets"
    for template in charts.ray_pods(one("RayJob", VARIANTS["rayjob"])):
        assert template["spec"]["nodeSelector"] == {"pool": "cpu"}
        assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}]
        assert template["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "store"}}]


@pytest.mark.parametrize("variant", charts.GOLDEN)
def test_what_is_rendered_is_what_was_reviewed(variant: str) -> None:
    """After a change that is meant: make deploy-golden, and read the diff."""
    assert golden.text(variant) == golden.path(variant).read_text()


def one(kind: str, values: dict[str, Any], release: str = RELEASES[-1]) -> Manifest:
    (found,) = (m for m in render(values, release) if m["kind"] == kind)
    return found


def test_the_grace_period_and_the_drain_follow_from_one_value() -> None:
    for seconds in (60, 900):
        values = {"shutdown": {"drainSeconds": 20, "longestGroupSeconds": seconds}}
        pod = one("Deployment", values)["spec"]["template"]["spec"]
        environment = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
        assert environment["PANOTRITON_EXIT_TIMEOUT_S"] == str(seconds)
        assert pod["containers"][0]["lifecycle"]["preStop"] == {"sleep": {"seconds": 20}}
        # ending what has nothing left to do takes the supervisor up to ten seconds
        assert pod["terminationGracePeriodSeconds"] >= 20 + seconds + 15


def callers(values: dict[str, Any]) -> list[Manifest]:
    return list(one("NetworkPolicy", values)["spec"]["ingress"][0]["from"])


def test_the_network_policy_lets_those_in_whom_the_other_values_send() -> None:
    proxies = {"matchLabels": {"kubernetes.io/metadata.name": "envoy-gateway-system"}}
    assert {"namespaceSelector": proxies} in callers(VARIANTS["gateway"])
    assert {"ipBlock": {"cidr": "203.0.113.0/24"}} in callers(VARIANTS["everywhere"])
    elsewhere = {"networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"a": "b"}}}]}}
    run = {
        "app.kubernetes.io/instance": "prod",
        "app.kubernetes.io/component": "dataset",
    }
    assert {"podSelector": {"matchLabels": run}} in callers(VARIANTS["job"] | elsewhere)


def test_a_load_balancer_keeps_the_callers_addresses() -> None:
    (service,) = (
        m["spec"]
        for m in json.loads(rendered("everywhere"))
        if m["kind"] == "Service" and m["spec"].get("clusterIP") != "None"
    )
    assert service["externalTrafficPolicy"] == "Local"
    assert service["loadBalancerSourceRanges"] == ["203.0.113.0/24"]


def test_kserve_keeps_the_replicas_or_leaves_them_to_keda() -> None:
    fixed = one("InferenceService", VARIANTS["kserve"])
    assert fixed["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "none"
    predictor = fixed["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (3, 3)
    scaled = one("InferenceService", VARIANTS["kserve-keda"])
    assert scaled["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "external"
    target = one("ScaledObject", VARIANTS["kserve-keda"])["spec"]["scaleTargetRef"]["name"]
    assert target == f"{scaled['metadata']['name']}-predictor"


def test_keda_wakes_the_first_replica_by_a_queue_in_front() -> None:
    spec = one("ScaledObject", VARIANTS["keda-zero"])["spec"]
    assert spec["minReplicaCount"] == 0
    assert spec["triggers"][-1]["type"] == "redis"
    assert spec["fallback"]["replicas"] == 1  # Prometheus away is no reason to serve nobody


def test_tmp_holds_the_copy_of_an_object_stores_models() -> None:
    store = VARIANTS["s3"]["repository"] | {"downloadSize": "10Gi"}
    values = VARIANTS["s3"] | {"repository": store, "tmp": {"size": "512Mi"}}
    pod = one("Deployment", values)["spec"]["template"]["spec"]
    (tmp,) = (v["emptyDir"] for v in pod["volumes"] if v["name"] == "tmp")
    assert tmp["sizeLimit"] == f"{10 * 1024 + 512}Mi"
    resources = pod["containers"][0]["resources"]
    assert resources["requests"]["ephemeral-storage"] == f"{(4 + 10) * 1024}Mi"
    assert resources["limits"]["ephemeral-storage"] == f"{(16 + 10) * 1024}Mi"


def test_values_that_people_need_arrive() -> None:
    deployment = one("Deployment", VARIANTS["everywhere"])
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {
        "maxSurge": "25%",
        "maxUnavailable": 0,
    }
    template = deployment["spec"]["template"]
    assert template["metadata"]["labels"]["team"] == "vision"
    container = template["spec"]["containers"][0]
    assert container["image"] == f"panotriton@sha256:{'0' * 64}"
    assert container["resources"]["limits"]["cpu"] == 16
    assert container["resources"]["limits"]["nvidia.com/gpu.shared"] == 1
    assert {"name": "PANOTRITON_MAX_INFLIGHT", "value": "16"} in container["env"]
    assert container["volumeMounts"][-1]["mountPath"] == "/extra"
    assert template["spec"]["volumes"][-1]["configMap"] == {"name": "extra"}
    assert one("PodDisruptionBudget", VARIANTS["everywhere"])["spec"]["maxUnavailable"] == "50%"


def test_a_claim_takes_the_place_of_the_device_plugin() -> None:
    pod = one("Deployment", VARIANTS["claim"])["spec"]["template"]["spec"]
    assert pod["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}]
    resources = pod["containers"][0]["resources"]
    assert resources["claims"] == [{"name": "gpu"}]
    assert "nvidia.com/gpu" not in resources["limits"]


def test_what_is_exported_for_a_gpu_uses_it() -> None:
    values = VARIANTS["export"]
    for more, wanted in (({}, True), ({"gpu": {"resource": "", "count": 0}}, False)):
        pod = one("Deployment", values | more)["spec"]["template"]["spec"]
        arguments = pod["initContainers"][0]["args"]
        assert (arguments[-2:] == ["--provider", "cuda"]) is wanted


def test_image_volumes_where_the_feature_gate_is_vouched_for() -> None:
    repository = VARIANTS["image"]["repository"]
    image = repository["image"] | {"featureGate": True}
    values = {"repository": repository | {"image": image}}
    pod = one("Deployment", values, release="1.33")["spec"]["template"]["spec"]
    assert pod["volumes"][-1]["image"]["reference"] == "models:1"


def named(kind: str, name: str, values: dict[str, Any]) -> Manifest:
    (found,) = (m for m in render(values) if (m["kind"], m["metadata"]["name"]) == (kind, name))
    return found


def test_each_pool_has_its_own_replicas_resources_and_nodes() -> None:
    values = VARIANTS["two-pools"]
    sr, qwen = (named("Deployment", f"prod-panotriton-{p}", values)["spec"] for p in ("sr", "qwen"))
    front = named("Deployment", "prod-panotriton", values)["spec"]
    assert (front["replicas"], qwen["replicas"]) == (2, 3)
    assert "replicas" not in sr  # its autoscaler's
    scaler = one("HorizontalPodAutoscaler", values)["spec"]
    assert scaler["scaleTargetRef"]["name"] == "prod-panotriton-sr"
    assert scaler["maxReplicas"] == 12
    assert qwen["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    pods = [part["template"]["spec"] for part in (front, sr, qwen)]
    assert [pod.get("nodeSelector") for pod in pods] == [None, {"gpu": "l4"}, {"gpu": "l40s"}]
    limits = [pod["containers"][0]["resources"]["limits"] for pod in pods]
    assert [limit.get("nvidia.com/gpu") for limit in limits] == [None, 1, 1]
    assert {pod["serviceAccountName"] for pod in pods} == {"prod-panotriton"}


def test_a_pool_says_nothing_of_where_others_are() -> None:
    """Only the front asks, and what callers of the front are for is the front's."""
    values = VARIANTS["pools-keda"] | {"kserve": {"enabled": False}}
    values |= {"server": {"maxInflight": 8}}
    front, pool = (
        {
            e["name"]
            for e in named("Deployment", name, values)["spec"]["template"]["spec"]["containers"][0][
                "env"
            ]
        }
        for name in ("prod-panotriton", "prod-panotriton-unet")
    )
    assert front - pool == {
        "PANOTRITON_PLACE",
        "PANOTRITON_TLS_FOLDER",
        "PANOTRITON_TLS_MUTUAL",
        "PANOTRITON_MAX_INFLIGHT",
    }
    assert not pool - front


def test_a_pool_scales_by_the_calls_that_wait_for_its_networks() -> None:
    triggers = named("ScaledObject", "prod-panotriton-unet", VARIANTS["pools-keda"])["spec"][
        "triggers"
    ]
    (trigger,) = triggers
    assert 'model=~"osediff_unet"' in trigger["metadata"]["query"]
    assert 'pod=~"prod-panotriton-unet-.*"' in trigger["metadata"]["query"]


def test_a_long_release_leaves_room_for_a_pools_names() -> None:
    values = {"pools": [{"name": "super-resolution-gpu", "models": ["osediff_unet"]}]}
    done = helm("template", "r" * 53, str(CHART), values=values)
    names = [m["metadata"]["name"] for m in yaml.safe_load_all(done.stdout) if m]
    assert max(map(len, names)) <= 63
    assert len([name for name in names if name.endswith("-super-resolution-gpu-headless")]) == 1


def test_the_schema_offers_what_can_be_placed() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    models = schema["properties"]["pools"]["items"]["properties"]["models"]["items"]["enum"]
    assert set(models) == {*PLACEABLE}


def test_the_commented_pools_of_the_values_render() -> None:
    text = (CHART / "values.yaml").read_text()
    lines = text.partition("pools: []\n")[2].partition("# and strategy")[0].splitlines()
    pools = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines))
    assert named("Deployment", "prod-panotriton-unet", {"pools": pools})["spec"]["replicas"] == 4
