"""`panotriton bench`: the project's measurements."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from panotriton.cli.connection import command
from panotriton.errors import InvalidInput, quoted

_SUITE = Path(__file__).parents[3] / "tests" / "bench" / "suite.json"


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = command(
        commands,
        "bench",
        "run the project's measurements",
        "Run the measurements in tests/bench of the source tree, all or the named ones, and write a report "
        "with plots to build/bench. Arguments go to tests/bench/run.py; each script also runs alone, with "
        "options of its own.",
        "  panotriton bench                     all, about half an hour\n"
        "  panotriton bench crop transport\n"
        "  panotriton bench gpu                 where there is one, 8 minutes; exit code 4 elsewhere\n"
        "  panotriton bench --quick             whether all of them run\n"
        "  panotriton bench --write-docs        the last results into README.md and docs/\n",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of measurements, as their scripts"
    )
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one run each")
    parser.add_argument("--write-docs", action="store_true", help="run nothing; fill the docs")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the runner; its exit code."""
    if not _SUITE.is_file():
        raise InvalidInput(
            f"no {_SUITE}: the measurements live in the source tree; run them from a checkout that is "
            "installed with pip install -e"
        )
    suite = json.loads(_SUITE.read_text())
    for name in options.names:
        if name not in suite:
            raise InvalidInput(f"no bench {quoted(name)}; expected some of {', '.join(suite)}")
    arguments = [*options.names, *["--quick"] * options.quick]
    arguments += ["--write-docs"] * options.write_docs
    with subprocess.Popen([sys.executable, str(_SUITE.with_name("run.py")), *arguments]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()  # it ends the servers that it has started, and we wait for that
            raise
