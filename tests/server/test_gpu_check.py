"""All parts of the check for GPUs, in smallest sizes on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "bench"))

import gpu  # noqa: E402
import script  # noqa: E402


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
