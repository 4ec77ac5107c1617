"""The chart rendered, for every way of deploying it, and validated against Kubernetes's schemas."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
CHART = ROOT / "docker" / "chart"
HELM = ROOT / "build" / "deploy" / "helm"
RELEASES = ("1.35", "1.36", "1.37")

# Kept as files under golden/, for a reviewable diff: make deploy-golden rewrites them.
GOLDEN = (
    "cpu",
    "default",
    "mig",
    "s3",
    "keda-zero",
    "gateway",
    "kserve",
    "two-pools",
    "job",
    "rayjob",
)

Manifest = dict[str, Any]

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "cpu": yaml.safe_load((CHART / "values-cpu.yaml").read_text()),
    "mig": {"gpu": {"resource": "nvidia.com/mig-3g.40gb", "count": 1}, "nodeSelector": {"a": "b"}},
    "pvc": {"repository": {"source": "pvc", "pvc": {"claimName": "models", "subPath": "v1"}}},
    "s3": {
        "repository": {
            "source": "s3",
            "s3": {"address": "s3://bucket/models", "secret": "s3", "region": "eu-central-1"},
        },
        "networkPolicy": {"egress": [{"ports": [{"port": 443, "protocol": "TCP"}]}]},
    },
    "gcs": {
        "repository": {"source": "gcs", "gcs": {"address": "gs://bucket/models", "secret": "gcs"}},
        "networkPolicy": {"egress": [{"ports": [{"port": 443, "protocol": "TCP"}]}]},
    },
    "image": {"repository": {"source": "image", "image": {"reference": "models:1"}}},
    "export": {"repository": {"source": "export"}},
    "hpa": {"autoscaling": {"kind": "hpa"}},
    "keda": {"autoscaling": {"kind": "keda"}},
    "keda-zero": {
        "autoscaling": {
            "kind": "keda",
            "minReplicas": 0,
            "keda": {
                "triggers": [
                    {
                        "type": "redis",
                        "metadata": {
                            "address": "redis:6379",
                            "listName": "groups",
                            "listLength": "4",
                        },
                    }
                ]
            },
        }
    },
    "gateway": {
        "grpcRoute": {
            "enabled": True,
            "parentRefs": [{"name": "gw", "namespace": "gateways"}],
            "proxyNamespace": "envoy-gateway-system",
            "hostnames": ["a.example"],
        }
    },
    "kserve": {"kserve": {"enabled": True}, "replicas": 3},
    "kserve-keda": {"kserve": {"enabled": True}, "autoscaling": {"kind": "keda"}},
    "job": {
        "job": {
            "enabled": True,
            "sampleN": 100,
            "inputClaim": "panoramas",
            "outputClaim": "groups",
        },
        "podMonitor": {"enabled": True},
    },
    "rayjob": {
        "image": {"pullSecrets": ["registry"]},
        "podMonitor": {"enabled": True},
        "job": {
            "enabled": True,
            "engine": "ray",
            "image": "panotriton-ray:0.1.0",
            "input": "s3://in/panoramas",
            "output": "s3://out/run",
            "secret": "store",
            "targetN": 1000000,
            "format": "webdataset",
            "options": ["--license=cc-by-4.0"],
            "deadlineSeconds": 604800,
            "labels": {"kueue.x-k8s.io/queue-name": "datasets"},
            "nodeSelector": {"pool": "cpu"},
            "tolerations": [{"key": "batch", "operator": "Exists"}],
            "priorityClassName": "batch",
            "ray": {"workers": 25},
        },
    },
    "observed": {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboard": {"enabled": True},
        "networkPolicy": {"egress": [{"ports": [{"port": 4318, "protocol": "TCP"}]}]},
        "server": {
            "otlp": {"url": "http://otel:4318/v1/traces"},
            "adminKeySecret": "admin",
            "extraArgs": ["--log-verbose=1"],
            "env": [{"name": "A", "value": "b"}],
        },
    },
    "everywhere": {
        "image": {"pullSecrets": ["registry"], "digest": f"sha256:{'0' * 64}"},
        "strategy": {"maxSurge": "25%", "maxUnavailable": 0},
        "podDisruptionBudget": {"maxUnavailable": "50%"},
        "podLabels": {"team": "vision"},
        "gpu": {"resource": "nvidia.com/gpu.shared", "count": 1},
        "resources": {"limits": {"cpu": 16}},
        "server": {
            "maxInflight": 16,
            "env": [{"name": "A", "value": "b"}],
            "extraVolumes": [{"name": "extra", "configMap": {"name": "extra"}}],
            "extraVolumeMounts": [{"name": "extra", "mountPath": "/extra", "readOnly": True}],
        },
        "runtimeClassName": "nvidia",
        "priorityClassName": "high",
        "podAnnotations": {"a": "b"},
        "serviceAccount": {"annotations": {"a": "b"}},
        "service": {
            "type": "LoadBalancer",
            "annotations": {"a": "b"},
            "sourceCidrs": ["203.0.113.0/24"],
        },
        "affinity": {"nodeAffinity": {}},
    },
    # The front needs no GPU: all that does is in the pools, which scale apart.
    "two-pools": {
        "gpu": {"resource": "", "count": 0},
        "resources": {
            "requests": {"cpu": "4", "memory": "16Gi"},
            "limits": {"cpu": "8", "memory": "32Gi"},
        },
        "replicas": 2,
        "podMonitor": {"enabled": True},
        "pools": [
            {
                "name": "sr",
                "models": [
                    "osediff_text_encoder",
                    "osediff_vae_encoder",
                    "osediff_unet",
                    "osediff_vae_decoder",
                ],
                "gpu": {"resource": "nvidia.com/gpu", "count": 1},
                "autoscaling": {"kind": "hpa", "maxReplicas": 12, "pendingPerReplica": 32},
                "nodeSelector": {"gpu": "l4"},
            },
            {
                "name": "qwen",
                "models": ["qwen"],
                "replicas": 3,
                "gpu": {"resource": "nvidia.com/gpu", "count": 1},
                "nodeSelector": {"gpu": "l40s"},
                "strategy": {"maxSurge": 1, "maxUnavailable": 0},
            },
        ],
    },
    "pools-keda": {
        "autoscaling": {"kind": "keda"},
        "kserve": {"enabled": True},
        "tls": {"secret": "certificates"},
        "pools": [{"name": "unet", "models": ["osediff_unet"]}],
    },
    "claim": {"gpu": {"claimTemplate": "one-gpu"}},
    "tls": {"tls": {"secret": "certificates", "mutual": True}},
}


def helm(*arguments: str, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run helm with the values on its standard input."""
    command = [str(HELM), *arguments, "--values", "-"]
    return subprocess.run(
        command, input=json.dumps(values), capture_output=True, text=True, check=False
    )


def render(values: dict[str, Any], release: str = RELEASES[-1]) -> list[Manifest]:
    """All manifests that an installation with these values makes."""
    done = helm(
        "template",
        "prod",
        str(CHART),
        "--namespace=pano",
        f"--kube-version={release}",
        values=values,
    )
    if done.returncode:
        raise ValueError(done.stderr)
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


@functools.cache
def rendered(variant: str, release: str = RELEASES[-1]) -> str:
    """`render` of a variant as JSON: a text, so that no test changes another's manifests."""
    return json.dumps(render(VARIANTS[variant], release))


def schema_problems(manifest: Manifest, release: str) -> list[str]:
    """What the schema of its kind has against a manifest; unknown fields are refused."""
    return list(_schema_problems(json.dumps(manifest, sort_keys=True), release))


@functools.cache
def _schema_problems(text: str, release: str) -> tuple[str, ...]:
    manifest = json.loads(text)
    name = f"{manifest['kind']}/{manifest['metadata']['name']}"
    custom = HERE / "schemas" / f"{manifest['kind']}.json"
    try:
        if custom.exists():
            schema = json.loads(custom.read_text())
            jsonschema.Draft202012Validator(schema).validate(manifest)
            pods = (json.dumps(pod) for pod in _pods_of_custom(manifest))
            return tuple(problem for pod in pods for problem in _schema_problems(pod, release))
        kubernetes_validate.validate(manifest, release, strict=True)
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path))
        return (f"{name} in {release}: {where}: {error.message}",)
    except kubernetes_validate.SchemaNotFoundError as error:
        return (f"{name} in {release}: {error.message}",)
    return ()


def _pods_of_custom(manifest: Manifest) -> list[Manifest]:
    """The pods that a custom resource makes, to be held against Kubernetes's own schema."""
    if manifest["kind"] == "InferenceService":
        own = ("minReplicas", "maxReplicas", "labels", "deploymentStrategy")
        spec = {k: v for k, v in manifest["spec"]["predictor"].items() if k not in own}
        return [
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": spec}
        ]
    if manifest["kind"] == "RayJob":
        return [
            {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "ray"}}
            for template in ray_pods(manifest)
        ]
    return []


def ray_pods(manifest: Manifest) -> list[Manifest]:
    """The templates of a RayJob's head and workers."""
    cluster = manifest["spec"]["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def server_models() -> set[str]:
    """Names of the repository's models."""
    return {path.parent.name for path in (ROOT / "model_repository").glob("*/config.pbtxt")}
