"""docker/auth/Caddyfile for real: the proxy in front of a real server, asked by the real client."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from panotriton import Camera, Client, PanotritonError, Tls
from panotriton.server.launch import LocalServer
from tests.deploy.certificates import certificates
from tests.deploy.charts import ROOT

CADDY = Path(sys.executable).parent / "caddy"
TOKEN = secrets.token_hex(16)
AHEAD = [Camera(0, 0, 0, 90, 0)]
# 50 MB there: larger than what proxies let through by default.
LARGE = np.random.default_rng(7).integers(0, 256, (2896, 5792, 3), np.uint8)
SMALL = LARGE[:64, :128]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalServer(ROOT / "model_repository", load_models=["crop"]) as running:
        yield running


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    certificates(folder)
    return folder


@contextmanager
def proxy(server: LocalServer, keys: Path, **settings: str) -> Iterator[str]:
    """The address of a proxy that asks for what the settings say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(keys),
        "AUTH_LISTEN": f":{port}",
        "AUTH_TLS": str(keys),
        "AUTH_GRPC": server.grpc_url,
        "AUTH_HTTP": server.http_url,
        **settings,
    }
    command = [CADDY, "run", "--config", ROOT / "docker" / "auth" / "Caddyfile"]
    with (keys / "caddy.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        while True:
            assert process.poll() is None, (keys / "caddy.log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"localhost:{port}"
    finally:
        process.terminate()
        assert process.wait(30) == 0


def ask(
    url: str, tls: Tls, protocol: str, headers: dict[str, str], image: np.ndarray = SMALL
) -> None:
    with Client(url, tls=tls, protocol=protocol, headers=headers, retries=0) as client:
        (crop,) = client.crop(image, AHEAD, size=64)
        assert crop.numpy().shape == (64, 64, 3)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_token_opens_it_and_nothing_else_does(
    server: LocalServer, keys: Path, protocol: str
) -> None:
    tls = Tls(keys / "ca.crt")
    with proxy(server, keys, AUTH_TOKEN=TOKEN) as url:
        ask(url, tls, protocol, {"authorization": f"Bearer {TOKEN}"}, LARGE)
        for wrong in ({}, {"authorization": TOKEN}, {"authorization": f"Bearer {TOKEN[:-1]}"}):
            with pytest.raises(PanotritonError, match="401"):
                ask(url, tls, protocol, wrong)


@pytest.mark.parametrize("token", [None, "", "short"])
def test_without_a_proper_token_nobody_is_let_in(
    server: LocalServer, keys: Path, token: str | None
) -> None:
    with proxy(server, keys, **({} if token is None else {"AUTH_TOKEN": token})) as url:
        for shown in ("Bearer ", "Bearer", f"Bearer {token}"):
            with pytest.raises(PanotritonError, match="401"):
                ask(url, Tls(keys / "ca.crt"), "grpc", {"authorization": shown})


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_certificate_opens_it_and_nothing_else_does(
    server: LocalServer, keys: Path, protocol: str, tmp_path: Path
) -> None:
    certificates(tmp_path)  # another authority's
    with proxy(server, keys, AUTH_BY="certificate") as url:
        ask(url, Tls(keys / "ca.crt", keys / "caller.crt", keys / "caller.key"), protocol, {})
        stranger = Tls(keys / "ca.crt", tmp_path / "caller.crt", tmp_path / "caller.key")
        for tls in (Tls(keys / "ca.crt"), stranger):
            with pytest.raises(PanotritonError):
                ask(url, tls, protocol, {"authorization": f"Bearer {TOKEN}"})


def test_a_wrong_setting_is_no_start(keys: Path, tmp_path: Path) -> None:
    for settings in ({"AUTH_BY": "trust"}, {"AUTH_TLS": str(tmp_path), "AUTH_TOKEN": TOKEN}):
        done = subprocess.run(
            [CADDY, "run", "--config", ROOT / "docker" / "auth" / "Caddyfile"],
            env={"PATH": os.environ["PATH"], "HOME": str(keys), "AUTH_TLS": str(keys), **settings},
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert done.returncode != 0
        assert "AUTH_BY" in settings or "tls.crt" in done.stderr
