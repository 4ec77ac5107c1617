"""What every rendered deployment must have, one function per rule: manifests in, complaints out."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tests.deploy.charts import ray_pods

Manifest = dict[str, Any]
Policy = Callable[[list[Manifest]], Iterator[str]]

_RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
}
_COMPONENT = "app.kubernetes.io/component"
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1}
_QUANTITIES = _UNITS | {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_LABEL = re.compile(r"|[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_OLD = {"autoscaling/v2beta1", "autoscaling/v2beta2", "policy/v1beta1", "batch/v1beta1"}
_PROBES = {
    "startupProbe": "/ready",
    "readinessProbe": "/ready",
    "livenessProbe": "/live",
}


def problems(manifests: list[Manifest]) -> list[str]:
    """Every complaint of every policy, each with its policy's name before it."""
    return [f"{name}: {text}" for name, policy in POLICIES.items() for text in policy(manifests)]


def not_privileged(manifests: list[Manifest]) -> Iterator[str]:
    for name, pod in _pods(manifests):
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.get(field):
                yield f"{name} sets {field}"
        for volume in pod.get("volumes", []):
            if "hostPath" in volume:
                yield f"{name} mounts the node's {volume['hostPath']}"
        for container in _containers(pod):
            if container.get("securityContext", {}).get("privileged"):
                yield f"{name}/{container['name']} is privileged"


def restricted_security(manifests: list[Manifest]) -> Iterator[str]:
    for name, pod in _pods(manifests):
        context = pod.get("securityContext", {})
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name} has no seccompProfile RuntimeDefault"
        if not context.get("runAsUser"):
            yield f"{name} sets no runAsUser other than 0"
        for container in _containers(pod):
            own = container.get("securityContext", {})
            for field, wanted in _RESTRICTED.items():
                if own.get(field) is not wanted:
                    yield f"{name}/{container['name']}: {field} is {own.get(field)}, expected {wanted}"
            if own.get("capabilities", {}).get("drop") != ["ALL"]:
                yield f"{name}/{container['name']} keeps capabilities, expected drop: [ALL]"


def no_token(manifests: list[Manifest]) -> Iterator[str]:
    for name, pod in _pods(manifests):
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{name} mounts a token of the cluster's API, which it never calls"


def no_service_links(manifests: list[Manifest]) -> Iterator[str]:
    for name, pod in _pods(manifests):
        if pod.get("enableServiceLinks") is not False:
            yield f"{name}: service links would set PANOTRITON_… variables"


def limits_set(manifests: list[Manifest]) -> Iterator[str]:
    for name, pod in _pods(manifests):
        for container in _containers(pod):
            resources = container.get("resources", {})
            for kind in ("requests", "limits"):
                for what in ("cpu", "memory"):
                    if what not in resources.get(kind, {}):
                        yield f"{name}/{container['name']} has no {kind}.{what}"


def images_pinned(manifests: list[Manifest]) -> Iterator[str]:
    for name, pod in _pods(manifests):
        for container in _containers(pod):
            tag = container["image"].rpartition("/")[2].partition(":")[2]
            if tag in ("", "latest"):
                yield f"{name}/{container['name']} runs {container['image']}, expected a fixed tag"


def probes_present(manifests: list[Manifest]) -> Iterator[str]:
    for name, container in _servers(manifests):
        for probe, path in _PROBES.items():
            got = container.get(probe, {}).get("httpGet", {}).get("path")
            if got != path:
                yield f"{name}: {probe} asks {got}, expected {path}"


def drains_before_kill(manifests: list[Manifest]) -> Iterator[str]:
    """Draining and what Triton gives requests in flight must fit before SIGKILL."""
    for name, pod in _server_pods(manifests):
        server = _server(pod)
        sleep = server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        exit_s = int(_environment(server).get("PANOTRITON_EXIT_TIMEOUT_S", 0))
        grace = pod.get("terminationGracePeriodSeconds", 30)
        if not sleep or not exit_s:
            yield f"{name} has no preStop sleep or no PANOTRITON_EXIT_TIMEOUT_S"
        if grace <= sleep + exit_s:
            yield f"{name} is killed after {grace} s, expected more than {sleep} + {exit_s} s"


def shared_memory(manifests: list[Manifest]) -> Iterator[str]:
    """/dev/shm: in memory, at least 2 GiB, and with the memory limit leaving room beside it."""
    for name, pod in _server_pods(manifests):
        server = _server(pod)
        names = [m["name"] for m in server["volumeMounts"] if m["mountPath"] == "/dev/shm"]
        found = [v.get("emptyDir", {}) for v in pod["volumes"] if v["name"] in names]
        if not found or found[0].get("medium") != "Memory":
            yield f"{name} has no emptyDir of medium Memory at /dev/shm"
            continue
        size = _bytes(found[0].get("sizeLimit", "0"))
        if size < 2 << 30:
            yield f"{name}: /dev/shm has {size} bytes, expected at least 2 GiB"
        if size * 2 > _bytes(server["resources"]["limits"]["memory"]):
            yield f"{name}: /dev/shm takes more than half of the memory limit, which it counts towards"


def clients_share_no_memory(manifests: list[Manifest]) -> Iterator[str]:
    for name, pod in _server_pods(manifests):
        if _environment(_server(pod)).get("PANOTRITON_CLIENT_SHM") != "false":
            yield f"{name} lets callers of other pods register shared memory"


def one_owner_of_replicas(manifests: list[Manifest]) -> Iterator[str]:
    scaled = {
        scaler["spec"]["scaleTargetRef"]["name"]
        for scaler in _of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject")
    }
    for deployment in _of_kind(manifests, "Deployment"):
        if "replicas" in deployment["spec"] and deployment["metadata"]["name"] in scaled:
            yield f"Deployment/{deployment['metadata']['name']} sets replicas beside an autoscaler"


def no_versions_in_pods(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in _of_kind(manifests, "Deployment", "Job", "RayJob", "InferenceService"):
        for label in ("app.kubernetes.io/version", "helm.sh/chart"):
            if any(label in labels for labels in _all_labels(manifest)):
                yield f"{manifest['kind']}: {label} in the pod would roll every replica, and break a Job"


def current_versions(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        if manifest["apiVersion"] in _OLD:
            yield f"{manifest['kind']} is of the removed {manifest['apiVersion']}"


def disruption_budget(manifests: list[Manifest]) -> Iterator[str]:
    yield from _uncovered(manifests, "PodDisruptionBudget", lambda m: m["spec"]["selector"])


def network_policy(manifests: list[Manifest]) -> Iterator[str]:
    yield from _uncovered(manifests, "NetworkPolicy", lambda m: m["spec"]["podSelector"])
    for policy in _of_kind(manifests, "NetworkPolicy"):
        if set(policy["spec"].get("policyTypes", [])) != {"Ingress", "Egress"}:
            yield "NetworkPolicy does not cover both directions"
        if any("from" not in rule for rule in policy["spec"].get("ingress", [])):
            yield "NetworkPolicy lets everybody in"


def selectors_match(manifests: list[Manifest]) -> Iterator[str]:
    """A Service or PodMonitor must find the pods of one server, or all the run's, by label and port name."""
    servers = [(_labels(m), _server(_pod(m))) for m in manifests if _is_server(m)]
    for kind, selector, ports in _selectors(manifests):
        of_run = selector.get(_COMPONENT) == "dataset"
        pods = list(_runs(manifests)) if of_run else servers
        found = [pod for labels, pod in pods if selector.items() <= labels.items()]
        if len(found) != (len(pods) if of_run else 1):
            yield f"{kind} selects {selector}, which {len(found)} of {len(pods)} pods have"
        for container in found:
            named = {port["name"] for port in container["ports"]}
            yield from (f"{kind} names port {p}, the pod has {named}" for p in ports - named)


def pools_are_reached(manifests: list[Manifest]) -> Iterator[str]:
    """PANOTRITON_PLACE names headless services of servers that load it; policies let the front alone ask."""
    services = {m["metadata"]["name"]: m["spec"] for m in _of_kind(manifests, "Service")}
    for front in filter(_is_server, manifests):
        placement = _environment(_server(_pod(front))).get("PANOTRITON_PLACE", "")
        for models, addresses in (part.split("=") for part in placement.split()):
            service = services.get(addresses.partition(".")[0], {"selector": {}})
            if service.get("clusterIP") != "None":
                yield f"{addresses} is no headless service: its replicas would share one connection"
            pools = [m for m in manifests if _is_server(m) and _selected(service["selector"], m)]
            loaded = [_environment(_server(_pod(m)))["PANOTRITON_LOAD_MODELS"] for m in pools]
            if loaded != [models.replace(",", " ")]:
                yield f"{addresses} has {loaded}, the front asks it for {models}"
            yield from (text for pool in pools for text in _kept_apart(manifests, front, pool))


def _kept_apart(manifests: list[Manifest], front: Manifest, pool: Manifest) -> Iterator[str]:
    policies = [m["spec"] for m in _of_kind(manifests, "NetworkPolicy")]
    into = [rule["from"] for p in policies if _chosen(p, pool) for rule in p["ingress"]]
    out = [rule.get("to", []) for p in policies if _chosen(p, front) for rule in p["egress"]]
    name = pool["metadata"]["name"]
    for rules, other, way in ((into, front, "into"), (out, pool, "out of the front to")):
        peers = [peer.get("podSelector", {}).get("matchLabels") for rule in rules for peer in rule]
        if not any(labels and _selected(labels, other) for labels in peers):
            yield f"no NetworkPolicy lets the front's calls {way} {name}"
    asked = [
        rule["from"]
        for p in policies
        if _chosen(p, pool)
        for rule in p["ingress"]
        if {"port": "grpc"} in rule["ports"]
    ]
    for peer in (peer for rule in asked for peer in rule):
        if not _selected(peer.get("podSelector", {}).get("matchLabels", {}), front) or set(
            peer
        ) != {"podSelector"}:
            yield f"NetworkPolicy lets others than the front ask {name}: {peer}"


def _chosen(policy: Manifest, manifest: Manifest) -> bool:
    return _selected(policy["podSelector"]["matchLabels"], manifest)


def _selected(selector: dict[str, str], manifest: Manifest) -> bool:
    return bool(selector) and selector.items() <= _labels(manifest).items()


def job_resumes(manifests: list[Manifest]) -> Iterator[str]:
    for job in _of_kind(manifests, "Job"):
        spec = job["spec"]
        if spec["template"]["spec"]["restartPolicy"] != "Never":
            yield "Job restarts in place, which podFailurePolicy does not allow"
        codes = [
            rule["onExitCodes"]["values"]
            for rule in spec.get("podFailurePolicy", {}).get("rules", [])
            if rule["action"] == "FailJob"
        ]
        if codes != [[2, 6]]:
            yield "Job tries again what stays wrong: input (2), too many failures (6)"
    for job in _of_kind(manifests, "Job", "RayJob"):
        if not job["spec"].get("backoffLimit"):
            yield f"{job['kind']} is not tried again: the run would not go on where it was"
    for job in _of_kind(manifests, "RayJob"):
        if not job["spec"].get("shutdownAfterJobFinishes"):
            yield "RayJob keeps its cluster when the run is done"


def api_server_rules(manifests: list[Manifest]) -> Iterator[str]:
    """What an API server checks beyond its schemas, as far as these manifests could get it wrong."""
    names = [f"{m['kind']}/{m['metadata']['name']}" for m in manifests]
    yield from (f"{name} is there twice" for name in _twice(names))
    for manifest in manifests:
        for label, value in manifest["metadata"].get("labels", {}).items():
            if len(value) > 63 or not _LABEL.fullmatch(value):
                yield f"{manifest['kind']}: label {label} is {value!r}"
        name = manifest["metadata"]["name"]
        if not _NAME.fullmatch(name) or len(name) > 63:
            yield f"{manifest['kind']} is called {name!r}"
    for manifest in _of_kind(manifests, "Deployment"):
        if not _selected(manifest["spec"]["selector"]["matchLabels"], manifest):
            yield f"{manifest['metadata']['name']}: the selector does not find its own pods"
    for name, pod in _pods(manifests):
        yield from (f"{name}: {text}" for text in _pod_rules(pod))
    for scaler in _of_kind(manifests, "HorizontalPodAutoscaler"):
        if not 0 < scaler["spec"]["minReplicas"] <= scaler["spec"]["maxReplicas"]:
            yield f"{scaler['metadata']['name']}: minReplicas is not between 1 and maxReplicas"


def _pod_rules(pod: Manifest) -> Iterator[str]:
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    yield from (f"volume {name} is there twice" for name in _twice(volumes))
    for volume in pod.get("volumes", []):
        if len(volume.keys() - {"name"}) != 1:
            yield f"volume {volume['name']} has not exactly one source"
    for container in _containers(pod):
        for field in ("env", "ports"):
            listed = [entry["name"] for entry in container.get(field, [])]
            yield from (f"{field} {name} is there twice" for name in _twice(listed))
        mounts = container.get("volumeMounts", [])
        yield from (f"no volume {m['name']}" for m in mounts if m["name"] not in volumes)
        yield from (f"two mounts at {path}" for path in _twice([m["mountPath"] for m in mounts]))
        yield from (
            f"port name {p['name']} is longer than 15"
            for p in container.get("ports", [])
            if len(p["name"]) > 15
        )
        limits = container["resources"]["limits"]
        for what, asked in container["resources"]["requests"].items():
            if what in limits and _quantity(asked) > _quantity(limits[what]):
                yield f"requests {asked} of {what}, more than the limit {limits[what]}"
        claims = {claim["name"] for claim in pod.get("resourceClaims", [])}
        yield from (
            f"no claim {c['name']}"
            for c in container["resources"].get("claims", [])
            if c["name"] not in claims
        )


def _twice(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _quantity(value: str | float) -> float:
    number = re.fullmatch(r"([0-9.]+)(m|[kMGT]i?|Ki)?", str(value))
    if number is None:
        return math.nan
    return float(number[1]) * _QUANTITIES[number[2] or ""]


POLICIES: dict[str, Policy] = {
    policy.__name__: policy
    for policy in (
        not_privileged,
        restricted_security,
        no_token,
        no_service_links,
        limits_set,
        images_pinned,
        probes_present,
        drains_before_kill,
        shared_memory,
        clients_share_no_memory,
        one_owner_of_replicas,
        no_versions_in_pods,
        current_versions,
        disruption_budget,
        network_policy,
        selectors_match,
        pools_are_reached,
        job_resumes,
        api_server_rules,
    )
}


def _of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def _pod(manifest: Manifest) -> Manifest:
    spec = manifest["spec"]
    return spec["predictor"] if manifest["kind"] == "InferenceService" else spec["template"]["spec"]


def _labels(manifest: Manifest) -> dict[str, str]:
    spec = manifest["spec"]
    if manifest["kind"] == "InferenceService":
        return spec["predictor"]["labels"]
    return spec["template"]["metadata"]["labels"]


def _all_labels(manifest: Manifest) -> list[dict[str, str]]:
    if manifest["kind"] == "RayJob":
        return [template["metadata"]["labels"] for template in ray_pods(manifest)]
    return [_labels(manifest)]


def _pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    for manifest in _of_kind(manifests, "Deployment", "Job", "InferenceService"):
        yield f"{manifest['kind']}/{manifest['metadata']['name']}", _pod(manifest)
    for job in _of_kind(manifests, "RayJob"):
        for template in ray_pods(job):
            (container,) = template["spec"]["containers"]
            yield f"RayJob/{container['name']}", template["spec"]


def _is_server(manifest: Manifest) -> bool:
    return manifest["kind"] in ("Deployment", "InferenceService")


def _server_pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    yield from _pods([manifest for manifest in manifests if _is_server(manifest)])


def _servers(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    yield from ((name, _server(pod)) for name, pod in _server_pods(manifests))


def _server(pod: Manifest) -> Manifest:
    return pod["containers"][0]


def _containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def _environment(container: Manifest) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


def _bytes(quantity: str) -> int:
    unit = quantity[-2:] if quantity[-2:] in _UNITS else ""
    return int(quantity.removesuffix(unit)) * _UNITS[unit]


def _uncovered(
    manifests: list[Manifest], kind: str, selector: Callable[[Manifest], Manifest]
) -> Iterator[str]:
    selectors = [selector(m)["matchLabels"] for m in _of_kind(manifests, kind)]
    for manifest in filter(_is_server, manifests):
        if not any(s.items() <= _labels(manifest).items() for s in selectors):
            yield f"no {kind} selects the pods of {manifest['kind']}"


def _runs(manifests: list[Manifest]) -> list[tuple[dict[str, str], Manifest]]:
    """The pods in which a data-set run's command is, its labels and its container."""
    templates = [job["spec"]["template"] for job in _of_kind(manifests, "Job")]
    templates += [ray_pods(job)[0] for job in _of_kind(manifests, "RayJob")]
    return [(each["metadata"]["labels"], _server(each["spec"])) for each in templates]


def _selectors(manifests: list[Manifest]) -> Iterator[tuple[str, dict[str, str], set[str]]]:
    for service in _of_kind(manifests, "Service"):
        ports = {port["targetPort"] for port in service["spec"]["ports"]}
        yield f"Service/{service['metadata']['name']}", service["spec"]["selector"], ports
    for monitor in _of_kind(manifests, "PodMonitor"):
        ports = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        yield "PodMonitor", monitor["spec"]["selector"]["matchLabels"], ports
