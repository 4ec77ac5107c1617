"""`panotriton live`: a page on which two panoramas become a group while one watches."""

from __future__ import annotations

import argparse
from typing import Any

from panotriton.cli.connection import (
    add_option,
    address,
    command,
    console_for,
    warn_of_absence,
)
from panotriton.cli.places import check_ports
from panotriton.cli.serve import add_repository_argument
from panotriton.errors import PanotritonError
from panotriton.pipeline.contract import MAX_UPSCALE

_EXAMPLES = """\
  panotriton live                          http://127.0.0.1:8080, by the server at localhost:8001
  panotriton live --local                  start a server for the page alone
  panotriton live --url gpu1:8001 --port 0 --visitors 8
"""
_MB = 1 << 20


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = command(
        commands,
        "live",
        "serve a page that shows the pipeline at work",
        "Serve a web page: drop two panoramas on it and see cameras, pairs, scores and in-between views "
        "as the server makes them. Closing the page cancels its run. What is uploaded is held in memory "
        "alone. Ctrl-C stops it.",
        _EXAMPLES,
    )
    parser.add_argument("--url", default="localhost:8001", help="gRPC of the server (%(default)s)")
    parser.add_argument("--local", action="store_true", help="start a server for this page alone")
    add_repository_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="%(default)s; 0: a free one")
    add_option(parser, "crop_size", "side in px")
    add_option(parser, "upscale", f"1 to {MAX_UPSCALE}")
    parser.add_argument("--visitors", type=int, default=4, help="runs at a time (%(default)s)")
    parser.add_argument(
        "--max-upload-mb", type=int, default=64, metavar="MB", help="of both files (%(default)s)"
    )
    parser.set_defaults(run=run, protocol="grpc", json=False)


def run(options: argparse.Namespace) -> int:
    """Serve until interrupted."""
    check_ports(options)
    try:
        from panotriton.web.live import Settings, create_app, serve  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise PanotritonError(
            f"the live page needs {error.name}: pip install 'panotriton[live]'"
        ) from error
    with address(options, console_for(options)) as (url, _):
        settings = Settings(
            url=url,
            host=options.host,
            crop_size=options.crop_size,
            upscale=options.upscale,
            max_upload_bytes=options.max_upload_mb * _MB,
            max_visitors=options.visitors,
        )
        warn_of_absence(url)
        serve(create_app(settings), options.host, options.port, _started)
    print("stopped")
    return 0


def _started(url: str) -> None:
    print(f"  {url}\nready; Ctrl-C stops it", flush=True)
