"""`panotriton dataset`: groups from all pairs of many panoramas, resumable."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from panotriton.cli.connection import (
    add_pipeline_arguments,
    add_server_arguments,
    address,
    client_options,
    command,
    console_for,
    pipeline_options,
    print_json,
)
from panotriton.cli.facts import weights
from panotriton.cli.places import check_folder, check_ports
from panotriton.cli.words import one_line, shown
from panotriton.errors import InvalidInput, PanotritonError
from panotriton.groups.cluster import ClusterEngine
from panotriton.groups.dataset import RETRY, Dataset, Summary
from panotriton.groups.local import LocalEngine
from panotriton.groups.maker import Outcome
from panotriton.groups.plan import find_panoramas
from panotriton.groups.progress import Progress, Usage, exposed, told
from panotriton.groups.replicas import Replicas, Servers, addresses
from panotriton.groups.sinks import LAYOUTS
from panotriton.groups.store import is_url
from panotriton.pipeline.images import FORMATS

ENGINES = ("local", "ray")

_TOO_MANY_FAILED = 6
_CONTACT_S = 60.0  # for a server that comes up as late as this
_PATIENCE_S = 600.0


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = command(
        commands,
        "dataset",
        "make many groups from folders of panoramas",
        "Run the pipeline on all pairs of the folders' panoramas in seeded order, until enough groups "
        "are done or enough intervals have passed the filter. Interrupted or killed, the same "
        "command goes on where it was; the result depends on the seed alone, not on --in-flight. "
        "While no healthy server answers the run pauses. A pair that a server failed on keeps its "
        "place for the next run.",
        "  panotriton dataset panoramas/ --sample-n 100 --seed 1 -o out\n"
        "  panotriton dataset indoor/ outdoor/ --target-n 500 --seed 1 -o out --in-flight 4\n"
        "  panotriton dataset panoramas/ --sample-n 100 -o out --report   with HTML pages\n"
        "  panotriton dataset panoramas/ --sample-n 2 -o out --local --json\n"
        "  panotriton dataset s3://in/panoramas --sample-n 100000 -o s3://out/run --format webdataset\n"
        "      --engine ray --address auto --url dns:///panotriton-headless:8001\n",
    )
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help=f"of {FORMATS} files; a path, s3://… or gs://…"
    )
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--sample-n", type=int, metavar="N", help="stop after N groups")
    amount.add_argument("--target-n", type=int, metavar="N", help="stop after N kept intervals")
    parser.add_argument("--seed", type=int, default=0, help="of order and cameras (%(default)s)")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="of the run; a path, s3://… or gs://…"
    )
    parser.add_argument(
        "--format", choices=LAYOUTS, default=LAYOUTS[0], help="of the groups (%(default)s)"
    )
    parser.add_argument("--license", default="unknown", help="for the data card (%(default)s)")
    parser.add_argument(
        "--in-flight",
        type=int,
        default=2,
        metavar="K",
        help="groups at a time at each server (%(default)s)",
    )
    parser.add_argument(
        "--report", action="store_true", help="write each group's report.html and index.html, too"
    )
    parser.add_argument(
        "--patience-s",
        type=float,
        default=_PATIENCE_S,
        metavar="S",
        help="how long to pause for a healthy server, then exit with 5; with 3 after a minute where none was "
        "ever there (%(default)s)",
    )
    parser.add_argument(
        "--retry-failed",
        choices=RETRY,
        default=RETRY[0],
        help="pairs of an earlier run to try again: those with the server's trouble (default), all, or "
        "none, so that others take their place",
    )
    parser.add_argument(
        "--max-failed",
        type=int,
        metavar="N",
        help="end with 6 when more pairs than this have failed (no limit)",
    )
    _add_engine_arguments(parser)
    add_pipeline_arguments(parser)
    add_server_arguments(parser)
    parser.set_defaults(run=run)


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="this process, or a Ray cluster (%(default)s)",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of the Ray cluster, auto: this machine's (a new one)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="with ray (by its processors)")
    parser.add_argument(
        "--worker-cpus", type=float, default=1.0, metavar="C", help="of each (%(default)s)"
    )
    parser.add_argument(
        "--progress",
        choices=("text", "json", "none"),
        default="text",
        help="a line for each group, JSON lines on stderr every --progress-s, or neither (%(default)s)",
    )
    parser.add_argument("--progress-s", type=float, default=10.0, metavar="S", help="(%(default)s)")
    parser.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="where Prometheus finds the run's metrics"
    )


def run(options: argparse.Namespace) -> int:
    """Make the data set; 1 where the number asked for was not reached, 6 with too many failures."""
    check_ports(options)
    if options.in_flight < 1:
        raise InvalidInput(f"--in-flight is {options.in_flight}; expected 1 or more")
    if not options.patience_s >= 0:
        raise InvalidInput(f"--patience-s is {options.patience_s:g}; expected 0 or more")
    console = console_for(options)
    dataset = _dataset(options)
    if not is_url(options.output):
        check_folder(Path(options.output))
    with address(options, console) as (url, protocol):
        servers = Servers(url.split(","), protocol, client_options(options))
        addresses(servers.urls)  # refuses what is none
        with _progress(options, dataset, console) as progress:
            try:
                summary = asyncio.run(_run(options, dataset, servers, progress))
            except InvalidInput:
                raise
            except (PanotritonError, KeyboardInterrupt):
                print("stopped; the same command goes on from here", file=sys.stderr)
                raise
    _show(options, console, dataset, summary)
    if dataset.too_many_failed:
        limit = f"more pairs failed than --max-failed {options.max_failed}"
        print(f"panotriton: {limit}: {shown(options.output)}/failed.json says why", file=sys.stderr)
        return _TOO_MANY_FAILED
    return 0 if summary.complete else 1


def _show(
    options: argparse.Namespace, console: Console, dataset: Dataset, summary: Summary
) -> None:
    if options.json:
        print_json({"output": str(options.output), **asdict(summary)})
        return
    console.print(*_result(summary, dataset), sep="")
    if options.report and summary.groups:
        console.print(shown(Path(options.output) / "index.html"), soft_wrap=True)


async def _run(
    options: argparse.Namespace, dataset: Dataset, servers: Servers, progress: Progress
) -> Summary:
    def say(line: str) -> None:
        print(one_line(line), file=sys.stderr, flush=True)

    waits = {
        "per_replica": options.in_flight,
        "patience_s": options.patience_s,
        "contact_s": min(_CONTACT_S, options.patience_s),
    }
    async with Usage(servers).watched() as usage:
        progress.usage = usage
        if options.engine == "local":
            async with Replicas(servers, say=say, **waits).watched() as replicas:
                return await dataset.run(LocalEngine(servers, replicas, options.patience_s))
        cluster = ClusterEngine(
            servers,
            address=options.address,
            workers=options.workers,
            worker_cpus=options.worker_cpus,
            patience_s=options.patience_s,
            replicas=waits,
            say=say,
        )
        with cluster:
            return await dataset.run(cluster)


def _dataset(options: argparse.Namespace) -> Dataset:
    about = {"weights": weights(options.repository)} if options.local else {}
    return Dataset(
        find_panoramas(options.folders),
        options.output,
        options.seed,
        sample_n=options.sample_n,
        target_n=options.target_n,
        options=pipeline_options(options).chosen(),
        layout=options.format,
        pages=options.report,
        about=about,
        retry_failed=options.retry_failed,
        max_failed=options.max_failed,
        license=options.license,
    )


@contextlib.contextmanager
def _progress(
    options: argparse.Namespace, dataset: Dataset, console: Console
) -> Iterator[Progress]:
    """As --progress wants it: lines and a bar, JSON lines, or nothing."""
    progress = Progress(dataset.sample_n, dataset.target_n)
    with contextlib.ExitStack() as stack:
        if options.metrics_port is not None:
            stack.enter_context(exposed(progress, options.metrics_port))
        if options.progress == "json":
            stack.enter_context(told(progress, options.progress_s, sys.stderr))
        show: Callable[[str], None] = _silent
        if options.progress == "text":
            show = stack.enter_context(_reported(progress, console))

        def report(summary: Summary, line: str, outcome: Outcome) -> None:
            progress.update(summary, outcome)
            show(line)

        dataset.report = report
        yield progress


def _silent(line: str) -> None:
    pass


@contextlib.contextmanager
def _reported(progress: Progress, console: Console) -> Iterator[Callable[[str], None]]:
    """One line per group; on a terminal a bar below them."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bar(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(progress.unit, total=progress.wanted)

        def show(line: str) -> None:
            console.print(shown(line))
            bar.update(task, completed=progress.reached, description=progress.words)

        yield show


def _result(summary: Summary, dataset: Dataset) -> tuple[Text, str]:
    counts = (
        f"{summary.groups} groups: {summary.intervals_kept} intervals kept, "
        f"{summary.intervals_dropped} dropped; {summary.failed} pairs failed"
    )
    short = "" if summary.complete else f"; {_why_short(dataset)}"
    return Text(counts, "bold"), f"{short} → {shown(dataset.output)}"


def _why_short(dataset: Dataset) -> str:
    if dataset.owes:
        return "the same command tries again what a server failed on"
    return "there are no more pairs"
