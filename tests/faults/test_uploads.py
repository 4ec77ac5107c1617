"""A hundred large bodies at once: all are answered, and the gateway holds only some of them at a time."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import numpy as np
import psutil
import pytest

from panotriton.server.launch import LocalServer

pytestmark = pytest.mark.thorough
MIB = 1 << 20
UPLOADS = 100
SHAPE = (2236, 4472, 3)  # 30 MB


def test_a_hundred_uploads_take_bounded_memory(standin_repository: Path, tmp_path: Path) -> None:
    body = io.BytesIO()
    np.save(body, np.random.default_rng(1).integers(0, 256, SHAPE, np.uint8))
    with LocalServer(standin_repository) as server:
        command = [sys.executable, "-m", "panotriton", "gateway", "--url", server.grpc_url]
        command += ["--output", str(tmp_path / "out")]
        command += [f"--{name}-port=0" for name in ("preprocess", "osediff", "quality")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as gateway:
            try:
                assert gateway.stdout is not None
                url = _address(gateway.stdout, "quality")
                peak = _upload(url, body.getvalue(), psutil.Process(gateway.pid))
            finally:
                gateway.terminate()
    print(
        f"{UPLOADS} × {len(body.getvalue()) / MIB:.0f} MiB: {peak / MIB:.0f} MiB resident at most"
    )
    assert peak < 1000 * MIB


def _address(lines: TextIO, service: str) -> str:
    """Where a gateway that starts says that a service is."""
    for line in iter(lines.readline, ""):
        if line.split()[:1] == [service]:
            return line.split()[1]
    raise AssertionError("the gateway ended")


def _upload(url: str, body: bytes, gateway: psutil.Process) -> int:
    """Bytes resident at most."""
    ended = threading.Event()
    peak = 0

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, gateway.memory_info().rss)

    def post(number: int) -> int:
        headers = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{url}/evaluate_pairs_tensor?layout=HWC", body, headers)
        with urllib.request.urlopen(request, timeout=600) as reply:
            reply.read()
            return int(reply.status)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(UPLOADS) as pool:
            assert list(pool.map(post, range(UPLOADS))) == [200] * UPLOADS
    finally:
        ended.set()
        watcher.join()
    return peak
