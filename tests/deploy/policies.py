"""What every rendered deployment must have, one function per rule: manifests in, complaints out."""

from __future__ import annotations

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
    """A Service or PodMonitor must find the server's pods, or the run's, by label and by port name."""
    for kind, selector, ports in _selectors(manifests):
        found = _runs(manifests) if selector.get(_COMPONENT) == "dataset" else None
        servers = [(_labels(m), _server(_pod(m))) for m in manifests if _is_server(m)]
        for labels, container in servers if found is None else found:
            if not selector.items() <= labels.items():
                yield f"{kind} selects {selector}, the pods have {labels}"
            named = {port["name"] for port in container["ports"]}
            yield from (f"{kind} names port {p}, the pod has {named}" for p in ports - named)


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
        job_resumes,
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
