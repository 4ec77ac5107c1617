"""What the measurements share: their options, the machine that they ran on, and how results are kept.

A script prints Markdown and, with --json, writes a JSON object whose "markdown" is the same text.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from panotriton.errors import PanotritonError
from panotriton.server.repository import check_exported

ROOT = Path(__file__).parents[2]
PANORAMAS = ROOT / "tests" / "data" / "panoramas"
GROUP = (PANORAMAS / "sunset.jpg", PANORAMAS / "city.jpg")  # what `make demo` sends
SEED = 7
GROUP_BYTES = (
    1 << 30
)  # of shared memory: the images of a group of full size, all kept, and their pairs

NO_GPU = 4
"""Exit code of what needs a GPU where there is none."""

_ENDING = (signal.SIGINT, signal.SIGTERM)
_PACKAGES = (
    "panotriton",
    "nvidia-pytriton",
    "onnxruntime",
    "openvino",
    "torch",
    "transformers",
    "numpy",
    "opencv-python-headless",
    "tritonclient",
)


def options(doc: str, add: Callable[[argparse.ArgumentParser], None] | None = None) -> Any:
    """Parse --quick, --json and --repository, and what `add` adds; `doc` is the module's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="whether it runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--repository", type=Path, default=ROOT / "repository", help="exported models (%(default)s)"
    )
    if add is not None:
        add(parser)
    return parser.parse_args()


def exported(folder: Path) -> Path:
    """The folder, if models were exported to it; raises ServerStartError with the command."""
    check_exported(folder)
    return folder


def finish(chosen: Any, result: dict[str, Any], markdown: str) -> None:
    """Print the text and write the JSON where asked."""
    print(markdown)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"markdown": markdown, **result}, indent=1) + "\n")


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script so that Ctrl-C and SIGTERM end what it started; exit code 130 then, 1 on errors."""
    # Set for both even where they are ignored: a shell starts background jobs so.
    for number in _ENDING:
        signal.signal(number, _interrupt)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except PanotritonError as error:
        sys.exit(f"error: {error}")
    sys.exit(0)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # Ctrl-C comes from the terminal and again from the runner: the second must not stop the cleaning up.
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (headings, rule, *rows))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    """What the numbers depend on: hardware, load before the start, versions, commit."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus(),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "commit": _commit(),
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs; none without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return listed.stdout.split("\n")[:-1] if listed.returncode == 0 else []


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit, "+" after it where files were changed since; "unknown" outside a checkout."""
    carried = ROOT / "COMMIT"  # written where a copy is made that is no checkout
    if carried.is_file():
        return carried.read_text().strip()
    head = _git("rev-parse", "--short", "HEAD")
    return head + "+" * bool(_git("status", "--porcelain", "-uno")) if head else "unknown"


def _git(*command: str) -> str:
    git = ["git", "-C", str(ROOT), *command]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
