"""`panotriton bench`: the project's measurements."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from panotriton.cli.connection import command
from panotriton.errors import InvalidInput

_FOLDER = Path(__file__).parents[3] / "tests" / "bench"


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = command(
        commands,
        "bench",
        "run the project's measurements",
        "Run one of the scripts in tests/bench of the source tree. Everything after its name goes to it.",
        "  panotriton bench                     lists them\n"
        "  panotriton bench crop\n"
        "  panotriton bench transport --help\n",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="for the script")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run one script; its exit code."""
    scripts = {path.stem: path for path in sorted(_FOLDER.glob("*.py"))}
    if not scripts:
        raise InvalidInput(
            f"no {_FOLDER}: the measurements live in the source tree; run them from a checkout that is "
            "installed with pip install -e"
        )
    if options.name is None:
        print("\n".join(scripts))
        return 0
    if options.name not in scripts:
        raise InvalidInput(f"no bench {options.name!r}; expected one of {', '.join(scripts)}")
    command = [sys.executable, str(scripts[options.name]), *options.arguments]
    return subprocess.run(command, check=False).returncode
