"""`panotriton doctor`: can a server run here, and what have dead processes left?"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from panotriton.cli.connection import command, console_for, print_json
from panotriton.client.client import Client
from panotriton.client.leftovers import dead_regions, find_leftovers
from panotriton.errors import PanotritonError, ServerStartError
from panotriton.pipeline.regions import FOLDER
from panotriton.pipeline.scratch import dead_folders
from panotriton.server.launch import find_installation
from panotriton.server.leftovers import orphaned_stubs

_COLOURS = {"ok": "green", "warning": "yellow", "bad": "red"}
_MIN_SHM_BYTES = 1 << 30
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Finding:
    """One line of the report; state is ok, warning or bad."""

    check: str
    state: str
    detail: str


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = command(
        commands,
        "doctor",
        "check this machine, and clean up after killed processes",
        "Check what a local server needs, and list what killed clients and servers left: processes, shared "
        "memory, temporary folders. "
        "A server on this machine is asked for regions of dead clients as well. Exit code 1 where "
        "something is bad, or was left and not removed.",
        "  panotriton doctor\n"
        "  panotriton doctor --fix              removes what dead processes left\n"
        "  panotriton doctor --json\n",
    )
    parser.add_argument("--fix", action="store_true", help="remove what dead processes left")
    parser.add_argument("--url", default="localhost:8001", help="gRPC, of a server (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check, and with --fix remove."""
    findings = [check() for check in (_python, _numpy, _glibc, _server, _shm)]
    findings += [*_stubs(options.fix), *_files(options.fix), *_folders(options.fix)]
    findings += _regions(options.url, options.fix)
    if options.json:
        print_json([asdict(finding) for finding in findings])
    else:
        table = Table("check", "", "", box=None, show_header=False)
        for finding in findings:
            mark = Text(finding.state, _COLOURS[finding.state])
            table.add_row(finding.check, mark, finding.detail)
        console_for(options).print(table)
    return 1 if any(finding.state == "bad" for finding in findings) else 0


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _numpy() -> Finding:
    version = metadata.version("numpy")
    if version.startswith("1."):
        return Finding("numpy", "ok", version)
    return Finding(
        "numpy", "warning", f"{version}; a local server needs numpy<2, a client does not"
    )


def _glibc() -> Finding:
    name, version = platform.libc_ver()
    return Finding("libc", "ok", f"{name} {version}".strip() or "unknown")


def _server() -> Finding:
    """Platform, glibc, the wheel, its Python stub, libpython and numpy, as starting it would check."""
    try:
        return Finding("tritonserver", "ok", str(find_installation().binary))
    except ServerStartError as error:
        return Finding("tritonserver", "warning", f"cannot run here: {error}")


def _shm() -> Finding:
    if not FOLDER.is_dir():
        return Finding("/dev/shm", "warning", "missing: no shared memory, no local server")  # noqa: S108
    space = os.statvfs(FOLDER)
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    detail = f"{free >> 20} of {total >> 20} MiB free"
    if free < _MIN_SHM_BYTES:
        more = "; a group of 512 px crops takes about 1 GiB: docker run --shm-size=4g"
        return Finding(str(FOLDER), "warning", detail + more)
    return Finding(str(FOLDER), "ok", detail)


def _stubs(fix: bool) -> list[Finding]:
    """Before the shared memory, which is a dead server's only once its stubs are gone."""
    found = []
    for stub in orphaned_stubs():
        what = f"process {stub.pid}, {stub.model}, left by a server that is gone"
        found.append(_left("stub", what, fix, stub.kill))
    return found


def _folders(fix: bool) -> list[Finding]:
    found = []
    for place in sorted({Path(tempfile.gettempdir()), Path("/tmp")}):  # noqa: S108 a server's, where the other has odd letters
        for folder in dead_folders(parent=place):
            what = f"{folder}, left by a process that is gone"
            found.append(_left("folder", what, fix, partial(shutil.rmtree, folder)))
    return found


def _files(fix: bool) -> list[Finding]:
    found = []
    for left in find_leftovers():
        what = f"{left.path.name}, {left.nbytes >> 20} MiB, left by a {left.owner} that is gone"
        found.append(_left("shared memory", what, fix, left.remove))
    return found or [Finding("leftovers", "ok", f"none in {FOLDER}")]


def _regions(url: str, fix: bool) -> list[Finding]:
    if url.rpartition(":")[0] not in _LOCAL_HOSTS:
        return []  # whose processes live elsewhere
    with Client(url, retries=0) as client:
        try:
            names = client.regions()
        except PanotritonError:
            return [Finding("server", "ok", f"none answers at {url}: no regions to check")]
        gone = [(name, partial(client.unregister, name)) for name in dead_regions(names)]
        where = f"registered at {url} by a client that is gone"
        return [_left("region", f"{name}, {where}", fix, remove) for name, remove in gone]


def _left(check: str, what: str, fix: bool, remove: Callable[[], None]) -> Finding:
    if not fix:
        return Finding(check, "bad", f"{what}: panotriton doctor --fix removes it")
    try:
        remove()
    except (OSError, PanotritonError) as error:
        return Finding(check, "bad", f"{what}: cannot be removed: {error}")
    return Finding(check, "ok", f"{what}: removed")
