"""Networks of full size with random weights, for which nothing has to be downloaded: time and memory.

    python tests/bench/fullsize.py    half an hour on 2 cores, 20 GB of disk

Stable Diffusion 2.1-base is exported, compared with PyTorch and super-resolves one 512×512 image behind
the server, by onnxruntime and by OpenVINO, both in fp32; Qwen2.5-VL-3B, in bfloat16, reads one
pair and writes four tokens.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import script
from memory_use import Memory
from osediff import MODELS, natural

from panotriton import Client
from panotriton.server.launch import LocalServer

ENGINES = {
    "onnxruntime, fp32": (),
    "OpenVINO, fp32": ("--provider", "openvino"),
}


def stable_diffusion(folder: Path, *engine: str) -> str:
    """Export the architecture of Stable Diffusion 2.1-base and super-resolve one 512×512 image."""
    repository = folder / "repository"
    rows = [export(repository, *engine)]
    weights = sum(path.stat().st_size for path in repository.rglob("*.data")) / 1e9
    with Memory(psutil.Process().pid) as used:
        began = time.perf_counter()
        with LocalServer(repository, load_models=list(MODELS), start_timeout_s=600) as server:
            rows.append(row("start of the server", began, used))
            with Client(server.grpc_url, timeout_s=1800) as client:
                for run in ("first", "second"):
                    began = time.perf_counter()
                    client.upscale(natural(512, 512), upscale=1)
                    rows.append(row(f"512×512, {run}", began, used))
    text = script.table(["step", "s", "peak so far, GB"], rows)
    return f"Weights beside the graphs: {weights:.1f} GB.\n\n{text}"


def export(repository: Path, *engine: str) -> list[str]:
    """Through the command, as a user does."""
    command = [sys.executable, "-m", "panotriton", "export", "osediff"]
    command += ["--preset", "full-random", "--output", str(repository), *engine]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    seconds = time.perf_counter() - began
    return ["export, and comparison with PyTorch", f"{seconds:.0f}", f"{peak_gb:.1f}"]


def row(step: str, began: float, used: Memory) -> list[str]:
    seconds = time.perf_counter() - began
    return [step, f"{seconds:.1f}", f"{used.peak_mb / 1e3:.1f}"]


def qwen(folder: Path) -> str:
    """What qwen.py measures with --real-size."""
    results = folder / "qwen.json"
    command = [sys.executable, str(Path(__file__).with_name("qwen.py")), "--real-size"]
    command += ["--work", str(folder), "--json", str(results)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return str(json.loads(results.read_text())["markdown"])


def main() -> None:
    """Measure and print. --quick is of no use here: full size is the point."""
    chosen = script.options(__doc__ or "")
    texts: dict[str, Any] = {}
    parts = {f"Stable Diffusion 2.1-base, {name}": engine for name, engine in ENGINES.items()}
    for title, engine in (*parts.items(), ("Qwen2.5-VL-3B", None)):
        with tempfile.TemporaryDirectory(prefix="panotriton-fullsize-") as folder:
            work = Path(folder)
            texts[title] = qwen(work) if engine is None else stable_diffusion(work, *engine)
    markdown = "\n\n".join(f"### {title}\n\n{text}" for title, text in texts.items())
    script.finish(chosen, {"tables": texts}, markdown)


if __name__ == "__main__":
    script.run(main)
