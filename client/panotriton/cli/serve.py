"""`panotriton serve`: run the server on this machine."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from panotriton.cli.places import check_file, check_ports
from panotriton.errors import InvalidInput, ServerStartError
from panotriton.pipeline.channel import is_local
from panotriton.server.health import answer_probes
from panotriton.server.launch import Installation, LocalServer, find_installation
from panotriton.server.repository import (
    ALL_EXPORTED,
    check_exported,
    check_served,
    placed,
    with_behind,
)
from panotriton.server.supervise import EXIT_GAVE_UP, Supervisor

_EXAMPLES = """\
examples:
  panotriton serve                              repository/ on 127.0.0.1:8000 and :8001
  panotriton serve --log                        the same, with the server's log on the terminal
  panotriton serve --http-port 9000 --grpc-port 9001 --metrics-port 9002
  panotriton serve --tritonserver /opt/tritonserver/bin/tritonserver   inside an NGC container
  panotriton serve --models osediff_unet --host 10.0.0.7      a network alone, for another server,
  panotriton serve --place osediff_unet=10.0.0.7:8001         which is told so
  panotriton serve -- --trace-config=rate=100   what follows -- goes to tritonserver as it is
"""


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = commands.add_parser(
        "serve",
        help="start the Triton server and keep it until Ctrl-C",
        description="Start a real tritonserver with the model repository, wait until every model is "
        "ready, print where it listens, replace what dies, and on Ctrl-C or SIGTERM let requests in flight "
        "finish before it ends; a second Ctrl-C ends it at once. Exit code "
        f"{EXIT_GAVE_UP} where starting it again did not help.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_repository_argument(parser)
    parser.add_argument(
        "--models",
        metavar="NAME[,NAME]",
        help="serve only these, such as networks that other servers ask (all)",
    )
    parser.add_argument(
        "--place",
        action="append",
        default=[],
        metavar="NAME[,NAME]=HOST:PORT[,HOST:PORT]",
        help="networks that the servers at these gRPC addresses have, and this one does not load; "
        "may be given several times",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--http-port", type=int, default=8000, help="%(default)s; 0 picks a free one"
    )
    parser.add_argument(
        "--grpc-port", type=int, default=8001, help="%(default)s; 0 picks a free one"
    )
    parser.add_argument("--metrics-port", type=int, default=8002, help="%(default)s; 0: a free one")
    parser.add_argument(
        "--health-port",
        type=int,
        metavar="PORT",
        help="/live, /ready and /metrics of the supervision (the metrics port + 1); 0: a free one",
    )
    parser.add_argument(
        "--drain-s",
        type=float,
        default=300.0,
        metavar="S",
        help="what groups in flight get after Ctrl-C or SIGTERM (%(default)g)",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=5,
        metavar="N",
        help="starts after crashes of the server, within ten minutes, before it gives up (%(default)s)",
    )
    parser.add_argument("--log", action="store_true", help="stream the server's log to stderr")
    parser.add_argument("--log-file", type=Path, help="keep the server's log here")
    parser.add_argument("--log-verbose", type=int, default=0, metavar="N", help="Triton's level")
    parser.add_argument("--tritonserver", type=Path, metavar="PATH", help="a server to run instead")
    parser.add_argument(
        "--exit-timeout-s", type=float, default=30.0, help="for unloading, after that (%(default)g)"
    )
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="further flags of tritonserver")
    parser.set_defaults(run=run)


def add_repository_argument(parser: argparse.ArgumentParser) -> None:
    """Add --repository, the folder that `panotriton export` fills."""
    parser.add_argument(
        "--repository",
        type=Path,
        default=Path("repository"),
        metavar="DIR",
        help="model repository (%(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Serve until interrupted; EXIT_GAVE_UP when the server ends by itself again and again."""
    check_ports(options)
    if options.flags and not options.flags[0].startswith("-"):
        raise InvalidInput(
            f"{options.flags[0]} is no flag of tritonserver; a repository is named by --repository"
        )
    placement = " ".join(options.place)
    models = options.models and options.models.split(",")
    check_exported(options.repository, elsewhere=_elsewhere(placement, models))
    if models:
        check_served(options.repository, models)
        models = with_behind(options.repository, models)
    if options.log_file:
        check_file(options.log_file)
    installation: Installation = find_installation(options.tritonserver)
    if not is_local(options.host) and "--allow-client-shm" not in installation.flags:
        _say(
            f"this tritonserver is older than 26.05, and a malformed request can end it: open {options.host} "
            "only to callers that you trust (docs/RELIABILITY.md)"
        )
    print(f"starting tritonserver with {options.repository} …", flush=True)
    server = LocalServer(
        options.repository,
        host=options.host,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        log_file=options.log_file,
        log_verbose=options.log_verbose,
        exit_timeout_s=options.exit_timeout_s,
        extra_args=options.flags,
        controlled=True,
        load_models=models,
        placement=placement,
        installation=installation,
    )
    supervisor = Supervisor(server, drain_s=options.drain_s, restarts=options.restarts, say=_say)
    with _probes(supervisor, options) as health_port, server:
        print(f"  gRPC     {server.grpc_url}")
        print(f"  HTTP     http://{server.http_url}")
        print(f"  metrics  {server.metrics_url}")
        print(f"  health   http://{options.host}:{health_port}/ready")
        print("ready; Ctrl-C stops it", flush=True)
        if options.log:
            threading.Thread(target=_stream_log, args=(server,), daemon=True).start()
        code = supervisor.run()
        if code:
            print(_tail(server), file=sys.stderr)
        return code


def _elsewhere(placement: str, models: Sequence[str] | None) -> frozenset[str]:
    """What this server does not need of an exported repository."""
    others = ALL_EXPORTED - set(models) if models else frozenset()
    return placed(placement) | others


@contextlib.contextmanager
def _probes(supervisor: Supervisor, options: argparse.Namespace) -> Iterator[int]:
    port = options.health_port
    if port is None:
        port = options.metrics_port and (options.metrics_port + 1) % 65536  # after the last: any
    with contextlib.ExitStack() as stack:
        try:
            listening = stack.enter_context(answer_probes(supervisor, options.host, port))
        except OSError as error:
            raise ServerStartError(
                f"cannot listen on {options.host}:{port}: {error.strerror}; choose another --health-port"
            ) from error
        yield listening


def _say(line: str) -> None:
    with contextlib.suppress(
        OSError
    ):  # a terminal that hung up: what is said matters less than the drain
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _stream_log(server: LocalServer) -> None:
    for line in server.log_lines():
        sys.stderr.write(line)


def _tail(server: LocalServer) -> str:
    return "\n".join(server.log_text().splitlines()[-20:])
