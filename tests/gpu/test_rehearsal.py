"""The check for GPUs in smallest sizes on the CPU: all its parts, and the kit that carries it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "gpu")]

import fill  # noqa: E402
import gpu  # noqa: E402
import script  # noqa: E402

from panotriton.server.engines import CPU  # noqa: E402


@pytest.mark.skipif(bool(script.gpus()), reason="there is a GPU: make gpu-check")
def test_every_part_runs_on_the_cpu(quick_repository: Path, tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "tests/bench/gpu.py"), "--quick", "--limit", "1800"]
    done = subprocess.run(
        [*command, "--repository", str(quick_repository), "--json", str(results)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    content = json.loads(results.read_text())
    parts = content["parts"]
    assert parts.keys() == {part.name for part in gpu.PARTS}
    errors = {
        (part, name): value["error"]
        for part, found in parts.items()
        for name, value in found.items()
        if isinstance(value, dict) and "error" in value
    }
    assert errors == {}
    assert "has no TensorRT" in parts["networks, TensorRT"]["not_run"]
    assert "- networks, TensorRT: not run: " in content["markdown"]
    assert parts["parity"]["whole image"]["psnr_db"] > 45
    assert len(parts["server"]["sizes in random order"]["ratios"]) == 10
    assert "A smoke run: no figure means anything." in content["markdown"]
    assert "| osediff_unet " in content["markdown"]


def test_graphs_without_weights_run_once_they_are_filled(tmp_path: Path) -> None:
    """Of a few layers: what is packed, filled and opened, in fp16, by the portable twin."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "tests/gpu/graphs.py"), str(tmp_path), "--tiny"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    unet = tmp_path / "repository" / "osediff_unet"
    assert "fixed_batches" in (unet / "config.pbtxt").read_text()
    assert not (unet / "1" / "model.onnx.data").exists()
    content = json.loads((unet / "1" / "manifest.json").read_text())
    assert fill.fill(unet / "1" / "manifest.json", "cpu") == content["total"]
    weight = next(each for each in content["tensors"] if len(each["shape"]) == 4)
    data = (unet / "1" / "model.onnx.data").read_bytes()
    drawn = np.frombuffer(data[weight["offset"] :][: weight["nbytes"]], weight["dtype"])
    assert drawn.std() == pytest.approx(weight["std"], rel=0.1)
    latent = np.ones((1, 4, 8, 8), np.float32)
    feeds = {"LATENT": latent, "PROMPT_EMBEDS": np.zeros((1, 77, 32), np.float32)}
    (noise,) = CPU.open(unet / "1" / "portable.onnx").run(["NOISE"], feeds)
    assert np.isfinite(noise).all()
    plain = (tmp_path / "plain" / "osediff_unet" / "1" / "model.onnx").read_bytes()
    assert b"InstanceNormalization" in plain
    assert b"InstanceNormalization" not in (unet / "1" / "model.onnx").read_bytes()
    assert {path.name for path in (tmp_path / "repository").iterdir()} >= {
        "qwen",
        "osediff",
        "panorama",
    }
