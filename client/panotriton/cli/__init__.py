"""The `panotriton` command."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from panotriton import __version__
from panotriton.cli import (
    bench,
    dataset,
    doctor,
    export,
    gateway,
    images,
    live,
    perf_data,
    process,
    report,
    serve,
)
from panotriton.errors import ConnectError, InvalidInput, OutOfPatience, PanotritonError

_EXIT_CODES = """\
exit codes:
  0  done               2  wrong arguments or input    130  interrupted
  1  the work failed    3  no server answers
  5  dataset: no healthy server for --patience-s
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are one line on stderr, never a traceback."""
    options = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # so that SIGTERM cleans up exactly as Ctrl-C does
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except PanotritonError as error:
        print(f"panotriton: {error}", file=sys.stderr)
        return _exit_code(error)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _exit_code(error: PanotritonError) -> int:
    if isinstance(error, InvalidInput):
        return 2
    if isinstance(error, OutOfPatience):
        return 5
    return 3 if isinstance(error, ConnectError) else 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="panotriton",
        description="Pairs of panoramas to quality-filtered, super-resolved image sequences, on Triton.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (export, serve, process, dataset):
        command.add_parser(commands)
    images.add_parsers(commands)
    for command in (report, live, gateway, doctor, perf_data, bench):
        command.add_parser(commands)
    return parser
