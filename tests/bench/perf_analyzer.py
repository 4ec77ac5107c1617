"""NVIDIA's perf_analyzer over the ensemble and each component, with real images as requests.

    python tests/bench/perf_analyzer.py [--models osediff crop] [--fetch]

--fetch only gets the tool (`make perf-analyzer`), which the first run does too. Current wheels need glibc
2.38; the binary of tritonclient 2.46.0 does not, with two libraries that are put beside it: libb64 from
Debian's package, unpacked without being installed, and libcudart from the server's own wheel. Requests come
from `panotriton perf-data`. The CSV files stay beside the tool, with --json in a folder beside that file.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import script

from panotriton.cli import main as panotriton
from panotriton.server.launch import LocalServer

FOLDER = script.ROOT / "build" / "bench" / "perf_analyzer"
TOOL = FOLDER / "tool"
WHEEL = "tritonclient==2.46.0"
LIBB64 = "libb64.so.0d"
LIBCUDART = "libcudart.so.12"
LIMIT_S = 240


@dataclass(frozen=True)
class Load:
    """Requests of one model: how many images, what at once, and through shared memory or not.

    window: requests that make up a measurement; perf_analyzer takes two or three until they agree.
    """

    name: str
    model: str
    images: tuple[Path, ...]
    at_once: str = "1:2"
    window: int = 10
    memory: bool = False


def loads(pair: Path, views: tuple[Path, ...]) -> list[Load]:
    """The ensemble, then its parts. `pair` is an image of 256×512 px, views are panoramas."""
    return [
        Load("panorama_encoded", "panorama_encoded", views, at_once="1", window=2),
        Load("preprocess", "preprocess", views),
        Load("decode", "decode", views),
        Load("crop", "crop", views),
        Load("osediff", "osediff", (pair,), window=4),
        Load("osediff, shared memory", "osediff", (pair,), window=4, memory=True),
        Load("qwen_scorer", "qwen_scorer", (pair,), window=6),
        Load("qwen_describer", "qwen_describer", (pair,), window=4),
    ]


def fetch() -> Path:
    """The binary with its libraries beside it, fetched once."""
    binary = TOOL / "perf_analyzer"
    if binary.exists():
        return binary
    part = TOOL.with_name(f".tool.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work:
        _binary(Path(work), part / "perf_analyzer")
        _libb64(Path(work), part)
    bundled = next(_server_libraries().glob("libcudart-*.so.12*"))
    shutil.copyfile(bundled, part / LIBCUDART)
    part.replace(TOOL)
    return binary


def _binary(work: Path, target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    where = ["--platform", "manylinux1_x86_64", "--dest", str(work)]
    subprocess.run([*pip, *where, WHEEL], check=True)
    with zipfile.ZipFile(next(work.glob("tritonclient-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/bin/perf_analyzer"))
        target.write_bytes(wheel.read(name))
    target.chmod(0o755)


def _libb64(work: Path, target: Path) -> None:
    installed = next(Path("/usr/lib").glob(f"*/{LIBB64}"), None)
    if installed is None:
        if shutil.which("apt-get") is None:
            sys.exit(
                f"error: {LIBB64} not found and no apt-get: install libb64, then run this again"
            )
        command = ["apt-get", "download", "-qq", "libb64-0d"]
        subprocess.run(command, cwd=work, check=True, stderr=subprocess.DEVNULL)
        package = next(work.glob("libb64-0d_*.deb"))
        subprocess.run(["dpkg-deb", "-x", package.name, "unpacked"], cwd=work, check=True)
        installed = next((work / "unpacked").rglob(LIBB64))
    shutil.copyfile(installed, target / LIBB64)


def _server_libraries() -> Path:
    spec = util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        sys.exit("error: nvidia-pytriton is not installed: pip install 'panotriton[serve]'")
    return Path(spec.origin).parents[1] / "nvidia_pytriton.libs"


def requests(load: Load, work: Path, count: int) -> Path:
    """A file of real requests of one shape."""
    path = work / f"{load.model}.json"
    images = [str(image) for image in load.images]
    more = ["--count", str(count), "--crop-size", "64"]
    with contextlib.redirect_stdout(io.StringIO()):  # the report is what is printed here
        failed = panotriton(["perf-data", load.model, *images, "-o", str(path), *more])
    if failed:
        sys.exit(f"error: no requests for {load.model}")
    return path


def analyze(
    server: LocalServer, load: Load, work: Path, kept: Path, quick: bool
) -> list[dict[str, str]]:
    """The rows of perf_analyzer's CSV, which goes to `kept`: one per number of requests at once."""
    report = kept / f"{load.name.replace(', ', '_').replace(' ', '_')}.csv"
    report.unlink(missing_ok=True)
    command = [
        *(str(fetch()), "-m", load.model, "-u", server.grpc_url, "-i", "grpc"),
        *("--input-data", str(requests(load, work, 2))),
        *("--concurrency-range", "1" if quick else load.at_once),
        *("--measurement-mode", "count_windows"),
        *("--measurement-request-count", "1" if quick else str(load.window)),
        *("--max-trials", "3", "--stability-percentage", "999" if quick else "50"),
        *("-f", str(report), "--verbose-csv"),
    ]
    if load.memory:
        command += ["--shared-memory", "system", "--output-shared-memory-size", str(64 << 20)]
    libraries = os.pathsep.join([str(TOOL), os.environ.get("LD_LIBRARY_PATH", "")])
    environment = os.environ | {"LD_LIBRARY_PATH": libraries}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, env=environment, timeout=LIMIT_S, check=False, **output)
    except subprocess.TimeoutExpired:
        sys.exit(f"error: perf_analyzer on {load.name} is not done after {LIMIT_S} s")
    if not report.exists():
        last = done.stdout.strip().splitlines()[-1:] or ["no output"]
        sys.exit(f"error: perf_analyzer on {load.name}: {last[0]}")
    with report.open(newline="") as file:
        return list(csv.DictReader(file))


def measure(repository: Path, names: list[str], kept: Path, quick: bool) -> dict[str, Any]:
    """Rows per load, all from one server."""
    found: dict[str, Any] = {}
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, LocalServer(repository) as server:
        work = Path(folder)
        pair = smaller(script.PANORAMAS / "city.jpg", work / "pair.png")
        for load in loads(pair, script.GROUP):
            if not names or load.model in names:
                found[load.name] = analyze(server, load, work, kept, quick)
    return {"loads": found}


def smaller(source: Path, target: Path) -> Path:
    """A panorama at 512×256 px, the size of a pair of small crops."""
    import cv2  # noqa: PLC0415  # only a measurement needs it, not --fetch

    cv2.imwrite(str(target), cv2.resize(cv2.imread(str(source)), (512, 256)))
    return target


def markdown(result: dict[str, Any]) -> str:
    """One row per load and number of requests at once."""
    rows = [
        (
            name,
            row["Concurrency"],
            f"{float(row['Inferences/Second']):.2f}",
            *(_ms(row[key]) for key in ("p50 latency", "p90 latency")),
            *(_ms(row[f"Server {key}"]) for key in ("Queue", "Compute Input", "Compute Infer")),
            _ms(row["Server Compute Output"]),
        )
        for name, measured in result["loads"].items()
        for row in measured
    ]
    headings = ("model", "at once", "requests a second", "p50 ms", "p90 ms", "queue ms")
    about = "Images of 512×256 px, panoramas of 1024×512; groups of crops of 64 px with 9 views."
    table = script.table([*headings, "input ms", "compute ms", "output ms"], rows)
    return f"{about}\n\n{table}"


def _ms(microseconds: str) -> str:
    return f"{float(microseconds) / 1e3:.1f}"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--fetch", action="store_true", help="get the tool and end")


def main() -> None:
    """Measure, print Markdown, and write JSON where asked."""
    chosen = script.options(__doc__, arguments)
    if chosen.fetch:
        print(fetch())
        return
    names = chosen.models or (["crop", "decode"] if chosen.quick else [])
    kept = chosen.json.parent / FOLDER.name if chosen.json else FOLDER
    result = measure(script.exported(chosen.repository), names, kept, chosen.quick)
    script.finish(chosen, result, markdown(result))


if __name__ == "__main__":
    script.run(main)
