"""The Dockerfile and its scripts: linted, held to the rules, and the CPU image's steps run for real."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from panotriton.server.engines import ENGINES
from tests.deploy import images
from tests.deploy.charts import HERE, ROOT
from tests.deploy.test_entrypoint import start, status, stop, wait_ready

DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
SERVERS = ("mounted", "baked", "cpu", "cpu-baked")


def test_hadolint_and_shellcheck_are_content() -> None:
    assert images.lint("hadolint", DOCKERFILE) == ""
    assert images.lint("shellcheck", *sorted(DOCKER.glob("*.sh"))) == ""


def test_hadolint_and_shellcheck_can_fail() -> None:
    said = images.lint("hadolint", HERE / "broken" / "Dockerfile")
    for rule in ("DL3006", "DL3008", "DL3020", "DL3025"):  # no tag, no pin, ADD, shell form
        assert rule in said
    assert "SC2086" in images.lint("shellcheck", HERE / "broken" / "entrypoint.sh")


def test_every_server_image_keeps_the_rules() -> None:
    assert list(images.problems(DOCKERFILE, SERVERS)) == []


def test_each_rule_can_fail() -> None:
    said = " ".join(images.problems(HERE / "broken" / "Dockerfile", ("server",)))
    for words in ("has no tag", "runs as root", "no HEALTHCHECK", "a shell before the entrypoint"):
        assert words in said


def test_the_default_image_is_the_gpu_server_with_a_mounted_repository() -> None:
    assert list(images.stages(DOCKERFILE))[-1] == "mounted"
    assert images.stages(DOCKERFILE)["gpu"].base == "${TRITON_IMAGE}"
    assert (
        "TRITON_IMAGE=nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3" in DOCKERFILE.read_text()
    )


def test_the_gpu_image_carries_networks_for_the_gpu() -> None:
    found = images.stages(DOCKERFILE)
    (copy,) = found["baked"].all_of("COPY")
    source = copy.partition("--from=")[2].split()[0]
    (export,) = found[source].all_of("RUN")
    assert "--provider cuda" in export
    assert ENGINES["cuda"].kind == "KIND_GPU"


@pytest.mark.parametrize("stage", ["weights", "weights-gpu"])
def test_the_command_line_takes_what_the_images_export(stage: str) -> None:
    (command,) = images.stages(DOCKERFILE)[stage].all_of("RUN")
    words = [sys.executable, "-m", *command.split(), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_install_keeps_to_the_tested_versions() -> None:
    installs = [
        text
        for stage in images.stages(DOCKERFILE).values()
        for text in stage.all_of("RUN")
        if "pip install" in text
    ]
    assert len(installs) == 4
    assert all("-c constraints.txt" in text for text in installs)
    assert '-c "$source/constraints.txt"' in (DOCKER / "install-cpu.sh").read_text()
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^numpy==1\.", constraints, re.MULTILINE)


def test_one_command_builds_on_digests_with_an_sbom_and_signs(tmp_path: Path) -> None:
    """The real script, with a docker and a cosign that write down what they are asked."""
    said = tmp_path / "said"
    digest = f"sha256:{'a' * 64}"
    for tool in ("docker", "cosign", "syft"):
        script = tmp_path / tool
        script.write_text(
            f'#!/bin/sh\necho "{tool} $*" >>{said}\n'
            f'case "$*" in *imagetools*) echo {digest} ;; esac\n'
        )
        script.chmod(0o755)
    command = ["sh", str(DOCKER / "build.sh"), "registry.example/panotriton", "0.1.0", "cpu-baked"]
    path = f"{tmp_path}:/usr/bin:/bin"
    subprocess.run(command, check=True, env={"PATH": path})
    calls = said.read_text()
    (build,) = (line for line in calls.splitlines() if "buildx build" in line)
    assert f"PYTHON_IMAGE=python:3.12-slim-bookworm@{digest}" in build
    assert f"TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.07-py3@{digest}" in build
    assert "--sbom=true" in build
    assert "--provenance=mode=max" in build
    assert "--target cpu-baked" in build
    assert f"cosign sign --yes registry.example/panotriton@{digest}" in calls


def test_the_build_command_names_what_it_expects() -> None:
    command = ["sh", str(DOCKER / "build.sh"), "panotriton"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected REPOSITORY TAG TARGET" in done.stderr


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    for stage in images.stages(DOCKERFILE).values():
        for source in images.copied(stage):
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignore, source


def test_the_extras_that_the_images_install_exist() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    extras = dict(re.findall(r"^(\w+) = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL))
    assert {"models", "qwen", "server", "export"} <= set(extras)
    assert "pytriton" not in extras["models"] + extras["qwen"]  # NVIDIA's image is the server
    assert "numpy==1." in extras["models"]


def test_compose_and_dockerfile_name_one_release() -> None:
    release = DOCKERFILE.read_text().partition("ARG TRITON_RELEASE=")[2].split()[0]
    assert f"tritonserver:{release}-py3-sdk" in (DOCKER / "compose.yaml").read_text()
    assert release in (DOCKER / "README.md").read_text()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU image's build steps in an empty folder: only what COPY takes, only what pip installs.

    Without the `qwen` extra, whose torch is gigabytes: what is under test is the server's layout.
    """
    folder = tmp_path_factory.mktemp("image")
    for source in images.copied(images.stages(DOCKERFILE)["sources"]):
        if (ROOT / source).is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / source, folder / "src" / source, ignore=skip)
        else:
            (folder / "src").mkdir(exist_ok=True)
            shutil.copy2(ROOT / source, folder / "src")
    command = [
        "sh",
        str(DOCKER / "install-cpu.sh"),
        str(folder / "src"),
        "server",
        str(folder / "opt" / "panotriton"),
        str(folder / "opt" / "tritonserver"),
    ]
    python = Path(sys.executable).resolve().parent  # the interpreter itself, of no environment
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{_bin(folder, python)}:/usr/bin:/bin", "PIP_QUIET": "1"}
    subprocess.run(command, check=True, env=environment)
    return folder


def _bin(folder: Path, python: Path) -> Path:
    """A folder with nothing but this very Python as python3."""
    tools = folder / "bin"
    tools.mkdir()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (tools / "python3").symlink_to(python / version)
    return tools


def test_the_cpu_image_starts_from_its_own_steps(installed: Path, tmp_path: Path) -> None:
    opt = installed / "opt"
    libraries = [opt / "tritonserver" / "lib", Path("/usr/local/lib")]
    server = start(
        {
            "PATH": f"{opt}/panotriton/bin:/usr/bin:/bin",
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "TRITONSERVER": str(opt / "tritonserver" / "bin" / "tritonserver"),
            "TRITON_BACKENDS": str(opt / "tritonserver" / "backends"),
            "PANOTRITON_REPOSITORY": str(installed / "src" / "model_repository"),
            "PANOTRITON_LOAD_MODELS": "decode preprocess select interpolate",
            "PANOTRITON_HOST": "127.0.0.1",
            "PANOTRITON_SHM_MIN_BYTES": "1048576",
        },
        tmp_path,
    )
    try:
        wait_ready(server)
        assert status(server, "v2/models/preprocess/ready") == 200
    finally:
        stop(server)
