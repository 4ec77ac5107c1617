"""`panotriton gateway`: the file-path services' endpoints and their tensor twins."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from panotriton.cli.connection import add_option, warn_of_absence
from panotriton.cli.places import check_ports
from panotriton.errors import PanotritonError
from panotriton.pipeline.contract import MAX_UPSCALE

_EXAMPLES = """\
examples:
  panotriton gateway -o out --root /data/panoramas      ports 5000, 5001, 5002 on 127.0.0.1
  panotriton gateway -o out --root /data --url gpu1:8001 --threads 8
  panotriton gateway -o out --root /data --shared-memory  the server runs on this machine
  panotriton gateway -o out --service osediff           one of the three in a process of its own
  panotriton gateway -o out --root /data --answer-within 280 --jpeg-quality 75
  panotriton gateway -o out --preprocess-port 0 --osediff-port 0 --quality-port 0    any free ports
"""
_MB = 1 << 20
_PORTS = {"preprocess": 5000, "osediff": 5001, "quality": 5002}


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = commands.add_parser(
        "gateway",
        help="serve the old file-path endpoints and their tensor twins over HTTP",
        description="Serve the endpoints of the three file-path services, unchanged, in front of a "
        "Triton server, and beside each the same work on tensors. Files are opened below --root and "
        "--output only. Ctrl-C stops it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="where group folders are made",
    )
    parser.add_argument(
        "--root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder below which requests may read and write; repeatable (--output is one)",
    )
    parser.add_argument("--url", default="localhost:8001", help="gRPC of the server (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    for service, port in _PORTS.items():
        parser.add_argument(
            f"--{service}-port",
            type=int,
            default=port,
            metavar="PORT",
            help="%(default)s; 0: a free one",
        )
    parser.add_argument(
        "--service",
        choices=_PORTS,
        action="append",
        help="serve this one only; repeatable (all three)",
    )
    parser.add_argument(
        "--seed", type=int, help="group g draws from seed + g (a number made of the output's path)"
    )
    add_option(parser, "crop_size", "side in px")
    add_option(parser, "upscale", f"1 to {MAX_UPSCALE}")
    parser.add_argument(
        "--threads", type=int, default=4, help="requests at work at once (%(default)s)"
    )
    parser.add_argument(
        "--answer-within",
        type=float,
        metavar="S",
        help="answer a list of images by then with what is done (when all is)",
    )
    parser.add_argument(
        "--jpeg-quality",
        type=int,
        default=95,
        metavar="Q",
        help="of .jpg files, 1 to 100 (%(default)s)",
    )
    parser.add_argument(
        "--max-body-mb",
        type=int,
        default=512,
        metavar="MB",
        help="of a tensor request (%(default)s)",
    )
    parser.add_argument(
        "--shared-memory",
        action="store_true",
        help="images reach a server of this machine through shared memory",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until interrupted."""
    check_ports(options)
    try:
        from panotriton.web.gateway import Settings, create_apps, serve  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise PanotritonError(
            f"the gateway needs {error.name}: pip install 'panotriton[gateway]'"
        ) from error
    settings = Settings(
        output=options.output,
        roots=tuple(options.root),
        url=options.url,
        seed=options.seed,
        crop_size=options.crop_size,
        upscale=options.upscale,
        threads=options.threads,
        answer_within_s=options.answer_within,
        jpeg_quality=options.jpeg_quality,
        max_body_bytes=options.max_body_mb * _MB,
        shared_memory=options.shared_memory,
    )
    ports = {name: getattr(options, f"{name}_port") for name in options.service or _PORTS}
    _log_progress()
    with create_apps(settings) as apps:
        warn_of_absence(options.url)
        serve({name: apps[name] for name in ports}, options.host, ports, _started)
    print("stopped")
    return 0


def _log_progress() -> None:
    """How far lists of images are, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("panotriton.web.gateway")
    log.setLevel(logging.INFO)
    log.addHandler(handler)


def _started(urls: dict[str, str]) -> None:
    for service, url in urls.items():
        print(f"  {service:<12}{url}  (API page: {url}/docs)")
    print("ready; Ctrl-C stops it", flush=True)
