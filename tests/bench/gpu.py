"""All that needs a GPU, in one command: server, parity, tests, scorer, and every network by every candidate.

    python tests/bench/gpu.py                  exports the full size with random weights, where it is missing
    python tests/bench/gpu.py --repository R   one that is exported with --provider cuda, or the kit's
    python tests/bench/gpu.py --quick          whether all of it runs, if need be on the CPU

Eight minutes at most besides the export. Each part runs in a process of its own, prints as it goes, and may
fail or be stopped without taking the others along; what it had found by then counts. Exit code 1 where a
part failed, 4 where there is no GPU. What a part measures: tests/gpu.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import script

from panotriton.pipeline.networks import OSEDIFF

FOLDER = script.ROOT / "tests" / "gpu"
LIMIT_S = 480
SHAPES = "512x1024@2,512x512@2,512x512@1,384x512@2,768x1280@1"
_GRACE_S = 15
_QUICK_TIMES = 10  # a few cores are slower than a GPU, even at the smallest sizes
_ERROR_CHARACTERS = 90


@dataclass(frozen=True)
class Part:
    """name: of its results; command: without options; limit_s: of its time."""

    name: str
    command: tuple[str, ...]
    limit_s: int


def networks(candidate: str, limit_s: int) -> Part:
    command = (str(FOLDER / "networks.py"), "--candidate", candidate)
    return Part(f"networks, {candidate}", command, limit_s)


PARTS = (
    Part("server", (str(FOLDER / "serving.py"),), 220),
    networks("shipped", 60),
    Part("parity", (str(FOLDER / "parity.py"),), 60),
    Part("tests", (str(FOLDER / "marked.py"),), 75),
    Part("scorer", (str(FOLDER / "reading.py"),), 90),
    Part("scorer, static", (str(FOLDER / "reading.py"), "--decode", "static"), 150),
    networks("as exported", 60),
    networks("CUDA graphs", 60),
    networks("exhaustive search", 60),
    networks("NCHW", 45),
    networks("torch eager", 45),
    networks("torch compiled", 120),
    networks("AOTInductor", 120),
    networks("TensorRT", 120),
)
CANDIDATES = [each.name.removeprefix("networks, ") for each in PARTS if "networks" in each.name]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plain", type=Path, help="graphs whose group norms are in pieces, for what needs them"
    )
    parser.add_argument(
        "--limit", type=int, default=LIMIT_S, help="seconds of all parts (%(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[each.name for each in PARTS])


def run_part(
    part: Part, chosen: Any, repository: Path, work: Path, left_s: float
) -> dict[str, Any]:
    """What the part found, and under "failed" why that is not all."""
    results = work / f"{part.name}.json"
    command = [sys.executable, *part.command, "--repository", str(repository)]
    command += ["--json", str(results), *["--quick"] * chosen.quick]
    if chosen.plain and "networks" in part.name:
        command += ["--plain", str(chosen.plain)]
    began = time.perf_counter()
    limit_s = part.limit_s * (_QUICK_TIMES if chosen.quick else 1)
    failed = supervise(command, min(limit_s, left_s))
    found = json.loads(results.read_text()) if results.is_file() else {}
    took = {"took_s": round(time.perf_counter() - began, 1)}
    return {**found, **took, **({"failed": failed} if failed else {})}


def supervise(command: Sequence[str], limit_s: float) -> str:
    """Run to the end or the limit, when it may still stop its server; why it failed, or ""."""
    with subprocess.Popen(command) as process:
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
            return f"stopped after {limit_s:.0f} s"
    return f"exit code {code}" if code else ""


def measure(chosen: Any, repository: Path, work: Path) -> dict[str, Any]:
    """Every part, while there is time."""
    ends = time.perf_counter() + chosen.limit
    parts: dict[str, Any] = {}
    for part in PARTS:
        if chosen.only and part.name not in chosen.only:
            continue
        left_s = ends - time.perf_counter()
        print(f"\n── {part.name}, {left_s:.0f} s left ──", flush=True)
        enough = left_s > _GRACE_S
        parts[part.name] = (
            run_part(part, chosen, repository, work, left_s)
            if enough
            else {"failed": "no time was left"}
        )
    return parts


# ------------------------------------------------------------------------------- repositories


def full_size() -> Path:
    """The full size in half precision with random weights for a GPU; exported where it is missing."""
    folder = script.ROOT / "build" / "gpu" / "repository"
    if not (folder / "osediff" / "1" / "osediff.json").is_file():
        from panotriton_export.presets import SMALL  # noqa: PLC0415, the kit needs it not

        export = [sys.executable, "-m", "panotriton", "export"]
        size = ["--preset", "full-random", "--precision", "fp16", "--provider", "cuda"]
        small = ["qwen", "--model", str(SMALL / "qwen")]
        for each in ([*export, *small], [*export, "osediff", *size, "--shapes", SHAPES]):
            subprocess.run([*each, "--output", str(folder)], check=True)
    return folder


def on_the_cpu(repository: Path, folder: Path) -> Path:
    """A repository's models with fixed shapes, as for a GPU, run by the CPU in its place."""
    from panotriton.models.input_shapes import input_shapes  # noqa: PLC0415
    from panotriton.models.one_step import read_network  # noqa: PLC0415
    from panotriton.models.super_resolution import Limits  # noqa: PLC0415
    from panotriton.pipeline.sizes import ImageSize  # noqa: PLC0415
    from panotriton.server.engines import CPU, CUDA  # noqa: PLC0415
    from panotriton_export.configs import set_engine, set_instances  # noqa: PLC0415

    shaped = {"shape_entries": CUDA.shape_entries, "backend": CUDA.backend}
    batches = {**dict.fromkeys(OSEDIFF.models, (1,)), OSEDIFF.denoiser: (1, 4)}
    engine = replace(CPU, fixed_batches=batches, **shaped)
    network = read_network(repository / "osediff" / "1", "osediff")
    expected = input_shapes(network, Limits(), [ImageSize(64, 64)])
    for config in repository.glob("*/config.pbtxt"):
        model = folder / config.parent.name
        model.mkdir()
        shutil.copy(config, model)
        (model / "1").symlink_to((config.parent / "1").resolve())
        if model.name in OSEDIFF.required:
            set_engine(model, engine, "fp32", expected.get(model.name, ()))
            text = (model / "config.pbtxt").read_text()
            (model / "config.pbtxt").write_text(
                text.replace("max_batch_size: 8", "max_batch_size: 1")
            )
            set_instances(model, 1)
    return folder


# ------------------------------------------------------------------------------- what it says


def markdown(result: Mapping[str, Any]) -> str:
    """The card, what callers see, the networks, and what failed."""
    parts = result["parts"]
    sections = [about(result["machine"], result["quick"]), callers(parts)]
    sections += [table_of_networks(parts, result["floors_ms"]), failures(parts)]
    return "\n\n".join(filter(None, sections))


def about(machine: Mapping[str, Any], quick: bool) -> str:
    card = ", ".join(machine["gpus"]) or "no GPU: the CPU in its place"
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    smoke = " A smoke run: no figure means anything." if quick else ""
    return (
        f"**{card}**, {machine['cores']} cores of {machine['cpu']}; {versions}; commit "
        f"{machine['commit']}, {machine['at']}.{smoke}"
    )


def callers(parts: Mapping[str, Any]) -> str:
    """Everything but the networks alone: a row a figure."""
    rows = [
        (part, name, shown(value))
        for part, found in parts.items()
        if not part.startswith("networks")
        for name, value in found.items()
        if name not in ("failed", "not_run")
    ]
    return script.table(("part", "measure", "result"), rows) if rows else ""


def shown(value: Any) -> str:
    if isinstance(value, Mapping):
        if "error" in value:
            return f"not run: {shown(value['error'])}"
        return ", ".join(f"{name} {shown(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " ".join(map(shown, value)) or "none"
    return str(value)[:_ERROR_CHARACTERS].replace("|", "/")


def table_of_networks(parts: Mapping[str, Any], floors_ms: Mapping[str, float]) -> str:
    """ms of each network and shape by each candidate, the first call's beside it, over the floor."""
    found = {each: parts.get(f"networks, {each}", {}) for each in CANDIDATES}
    labels = [name for each in found.values() for name in each if " " in name]
    columns = [each for each in CANDIDATES if found[each].keys() & set(labels)]
    if not columns:
        return ""
    rows = [
        (label, *(cell(found[each].get(label)) for each in columns), floors_ms.get(label, ""))
        for label in dict.fromkeys(labels)
    ]
    headings = ("network, input", *columns, "floor")
    note = "ms, and in brackets of the first call. Floor: FLOPs at 989 TFLOP/s, the datasheet's for an H100."
    return f"{note}\n\n{script.table(headings, rows)}"


def cell(value: Any) -> str:
    if not isinstance(value, Mapping):
        return ""
    if "error" in value:
        return shown(value)
    return f"{value['ms']} ({value['first_ms']:.0f})" + " not finite" * (
        not value.get("finite", True)
    )


def failures(parts: Mapping[str, Any]) -> str:
    lines = [
        f"- {name}: {found[why]}" if why == "failed" else f"- {name}: not run: {found[why]}"
        for name, found in parts.items()
        for why in ("failed", "not_run")
        if why in found
    ]
    return "Not all of it ran:\n\n" + "\n".join(lines) if lines else ""


def floors_ms(parts: Mapping[str, Any]) -> dict[str, float]:
    """Of the shapes that were measured at full size, by `cost`'s count."""
    labels = {name for part, found in parts.items() if "networks" in part for name in found}
    try:
        import floors  # noqa: PLC0415, imports torch and diffusers

        return floors.at_full_size(sorted(label for label in labels if " " in label))
    except Exception as error:  # a count that is missing must not lose what was measured
        print(f"no floors: {error}", file=sys.stderr)
        return {}


def main() -> None:
    """Measure, print Markdown, write JSON."""
    chosen = script.options(__doc__, arguments)
    if not script.gpus() and not chosen.quick:
        print(
            "NO GPU HERE: nothing was measured; --quick tries all of it on the CPU", file=sys.stderr
        )
        sys.exit(script.NO_GPU)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="panotriton-gpu-")))
        repository = chosen.repository
        if not script.gpus():
            (work / "repository").mkdir()
            repository = on_the_cpu(script.exported(repository), work / "repository")
        elif "KIND_GPU" not in (repository / OSEDIFF.denoiser / "config.pbtxt").read_text():
            repository = full_size()
        machine = script.machine()
        machine["versions"]["onnxruntime-gpu"] = script.version("onnxruntime-gpu")
        began = time.perf_counter()
        parts = measure(chosen, repository.resolve(), work)
        took_s = round(time.perf_counter() - began, 1)
    result = {
        "machine": machine,
        "quick": chosen.quick,
        "parts": parts,
        "floors_ms": {} if chosen.quick else floors_ms(parts),
        "took_s": took_s,
        "commit": machine["commit"],
        "at": machine["at"],
    }
    script.finish(chosen, result, markdown(result))
    if failed := [name for name, found in parts.items() if "failed" in found]:
        sys.exit(f"error: {', '.join(failed)} failed")


if __name__ == "__main__":
    script.run(main)
