"""The `panotriton` command."""

from __future__ import annotations

import argparse
import errno
import io
import signal
import sys
import tempfile
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
from panotriton.cli.connection import exit_code
from panotriton.cli.words import Parser, one_line
from panotriton.errors import PanotritonError, ServerStartError, brief

_EXIT_CODES = """\
exit codes:
  0  done               2  wrong arguments or input    130  interrupted
  1  the work failed    3  no server answers          4    serve: starting again did not help
  5  dataset: no healthy server for --patience-s
  6  dataset: more pairs failed than --max-failed
of several images each is worked on, and the first that failed gives the code
"""
# What an operating system says of a name that was given; anything else, as a full disk, is no one's mistake.
_OF_NAMES = {
    errno.EACCES,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
}
_FULL = {errno.EDQUOT, errno.ENOSPC}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are one line on stderr, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that is no UTF-8 prints as \udcff
            stream.reconfigure(errors="backslashreplace")
    options = build_parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that they clean up exactly as Ctrl-C does
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except PanotritonError as error:
        print(f"panotriton: {_words(error)}", file=sys.stderr)
        return exit_code(error)
    except OSError as error:  # a disk that is full, a folder that went away
        about = f"{brief(error.filename)}: {error.strerror}" if error.filename else str(error)
        if error.errno in _FULL:
            places = {tempfile.gettempdir(), str(getattr(options, "output", None) or ".")}
            about += f"; free some in {' or '.join(sorted(map(brief, places)))}, or write elsewhere"
        print(f"panotriton: {one_line(about)}", file=sys.stderr)
        return 2 if error.errno in _OF_NAMES else 1


def _words(error: PanotritonError) -> str:
    """The message; of a server that did not start, the lines of its log as they are."""
    if isinstance(error, ServerStartError):
        return "\n".join(map(one_line, str(error).split("\n")))
    return one_line(error)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
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
