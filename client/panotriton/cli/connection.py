"""Arguments and resources that the commands share: the server to ask, the pipeline's options, output."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from panotriton.cli.serve import add_repository_argument
from panotriton.cli.words import one_line
from panotriton.client.client import Client
from panotriton.client.tls import Tls
from panotriton.client.transports import TRANSPORTS
from panotriton.errors import ConnectError, InvalidInput, OutOfPatience, PanotritonError, quoted
from panotriton.pipeline.contract import ALIGNMENTS, DEFAULTS, MAX_UPSCALE, TENSORS, Options
from panotriton.pipeline.quality import finite_or_none
from panotriton.server.launch import LocalServer
from panotriton.server.repository import check_exported


def command(
    commands: Any, name: str, help_line: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """A subcommand whose --help ends with examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_line,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which server is asked, and how; and --json."""
    parser.add_argument("--url", default="localhost:8001", help="of the server (%(default)s)")
    parser.add_argument("--protocol", choices=list(TRANSPORTS), default="grpc")
    parser.add_argument("--tls", action="store_true", help="encrypt, and check the certificate")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="who signed it (the system's list)")
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        type=_header,
        metavar="NAME:VALUE",
        help="sent with every request, for authentication; may be repeated",
    )
    parser.add_argument("--local", action="store_true", help="start a server for this run alone")
    add_repository_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, no progress")


def add_sr_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of super-resolution."""
    add_option(parser, "upscale", f"1 to {MAX_UPSCALE}")
    add_option(parser, "align", ", ".join(ALIGNMENTS))
    parser.add_argument("--prompt", default=DEFAULTS.prompt, help="for the super-resolution (none)")


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a group, all but its seed."""
    add_option(parser, "crop_size", "side in px")
    add_sr_arguments(parser)
    add_option(parser, "threshold", "0 to 1")
    add_option(parser, "interpolations", "in-between views")
    add_sphere_option(parser)


def add_option(parser: argparse.ArgumentParser, name: str, about: str) -> None:
    """Add one of `contract.Options` with its type and default."""
    default = getattr(DEFAULTS, name)
    flag = f"--{name.replace('_', '-')}"
    parser.add_argument(flag, type=type(default), default=default, help=f"{about} (%(default)s)")


def add_sphere_option(parser: argparse.ArgumentParser) -> None:
    """Add what views are cut from."""
    parser.add_argument(
        "--sphere",
        "--sphere-size",
        dest="sphere_size",
        type=int,
        metavar="PX",
        default=DEFAULTS.sphere_size,
        help="side that a panorama is resized to before views are cut from it; 0: its own resolution, "
        "which is sharper (the side of a view)",
    )


def pipeline_options(options: argparse.Namespace) -> Options:
    """A group's options, those that the command has; raises InvalidInput, by their flags' names."""
    chosen = {name: getattr(options, name) for name in TENSORS if hasattr(options, name)}
    names = {name: f"--{name.replace('_', '-')}" for name in TENSORS}
    return Options(**chosen).check(names | {"sphere_size": "--sphere"})


def client_options(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Client` and `AsyncClient`, all but the address."""
    tls = Tls(ca=options.ca) if options.ca else options.tls
    return {"tls": tls, "headers": dict(options.header)}


@contextlib.contextmanager
def address(options: argparse.Namespace, console: Console) -> Iterator[tuple[str, str]]:
    """URL and protocol: of the named server, or of one of our own for the time being."""
    if not options.local:
        yield options.url, options.protocol
        return
    check_exported(options.repository)
    with contextlib.ExitStack() as stack:
        with spinner(console) as progress:
            progress.add_task("starting tritonserver")
            server = stack.enter_context(LocalServer(options.repository))
        try:
            yield getattr(server, f"{options.protocol}_url"), options.protocol  # one for each
        except KeyboardInterrupt:
            print("ending tritonserver, some seconds; again: at once", file=sys.stderr, flush=True)
            raise


@contextlib.contextmanager
def connected(options: argparse.Namespace, console: Console) -> Iterator[Client]:
    """A client of that server."""
    with (
        address(options, console) as (url, protocol),
        Client(url, protocol=protocol, **client_options(options)) as client,
    ):
        yield client


def warn_of_absence(url: str) -> None:
    """Say so where no server is ready at that gRPC address, for what starts without one."""
    with Client(url, timeout_s=1, retries=0) as client:
        if not client.ready():
            warn(
                f"no server is ready at {url}; start one with `panotriton serve`, or name another by --url"
            )


def exit_code(error: PanotritonError) -> int:
    """What a command ends with for that error; the codes are in `panotriton --help`."""
    if isinstance(error, InvalidInput):
        return 2
    if isinstance(error, OutOfPatience):
        return 5
    return 3 if isinstance(error, ConnectError) else 1


def console_for(options: argparse.Namespace) -> Console:
    """Where people read: silent with --json."""
    width = None if sys.stdout.isatty() else 200  # a file has no width to fit into
    # What is printed are names and values: nothing in them is markup.
    return Console(quiet=options.json, highlight=False, width=width, markup=False, emoji=False)


def spinner(console: Console) -> Progress:
    """A line that moves while something takes its time; nothing where nobody watches."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def warn(text: str) -> None:
    """One line on stderr, where there is something to say."""
    if text:
        print(f"panotriton: warning: {one_line(text)}", file=sys.stderr, flush=True)


def print_json(content: Any) -> None:
    """One JSON object on one line; numbers that are no number are null."""
    print(json.dumps(without_nan(content)))


def without_nan(value: Any) -> Any:
    """The same for JSON, which has no NaN: null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return finite_or_none(value) if isinstance(value, float) else value


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no NAME:VALUE")
    return name.strip(), value.strip()
