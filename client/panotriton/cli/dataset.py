"""`panotriton dataset`: groups from all pairs of many panoramas, resumable."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
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
from panotriton.cli.facts import facts
from panotriton.cli.places import check_folder
from panotriton.cli.words import one_line, shown
from panotriton.client.aio import AsyncClient
from panotriton.errors import InvalidInput, PanotritonError
from panotriton.groups import layout
from panotriton.groups.dataset import RETRY, Dataset, Summary, find_panoramas
from panotriton.pipeline.images import FORMATS

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
        "  panotriton dataset panoramas/ --sample-n 2 -o out --local --json\n",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help=f"of {FORMATS} files")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--sample-n", type=int, metavar="N", help="stop after N groups")
    amount.add_argument("--target-n", type=int, metavar="N", help="stop after N kept intervals")
    parser.add_argument("--seed", type=int, default=0, help="of order and cameras (%(default)s)")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="of the run"
    )
    parser.add_argument(
        "--in-flight", type=int, default=2, metavar="K", help="groups at a time (%(default)s)"
    )
    parser.add_argument(
        "--report", action="store_true", help="write each group's report.html and index.html, too"
    )
    parser.add_argument(
        "--patience-s",
        type=float,
        default=_PATIENCE_S,
        metavar="S",
        help="how long to pause for a healthy server, then exit with 5 (%(default)s)",
    )
    parser.add_argument(
        "--retry-failed",
        choices=RETRY,
        default=RETRY[0],
        help="pairs of an earlier run to try again: those with the server's trouble (default), all, or "
        "none, so that others take their place",
    )
    add_pipeline_arguments(parser)
    add_server_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the data set; 1 where the pairs ran out before the number asked for was reached."""
    console = console_for(options)
    dataset = _dataset(options)
    check_folder(options.output)
    with address(options, console) as place, _reported(dataset, console):
        try:
            summary = asyncio.run(_run(dataset, *place, client_options(options)))
        except InvalidInput:
            raise
        except (PanotritonError, KeyboardInterrupt):
            print("stopped; the same command goes on from here", file=sys.stderr)
            raise
    if options.json:
        print_json({"output": str(options.output), **asdict(summary)})
    else:
        console.print(*_result(summary, options.output), sep="")
        if options.report and summary.groups:
            console.print(shown(options.output / "index.html"), soft_wrap=True)
    return 0 if summary.complete else 1


async def _run(dataset: Dataset, url: str, protocol: str, more: dict[str, Any]) -> Summary:
    async with AsyncClient(url, protocol=protocol, retries=0, **more) as client:  # the run's own
        return await dataset.run(client)


def _dataset(options: argparse.Namespace) -> Dataset:
    repository = options.repository if options.local else None

    async def ask(client: AsyncClient) -> dict[str, Any]:
        return facts(await client.health(), repository)

    return Dataset(
        find_panoramas(options.folders),
        options.output,
        options.seed,
        sample_n=options.sample_n,
        target_n=options.target_n,
        in_flight=options.in_flight,
        options=pipeline_options(options).chosen(),
        pages=options.report,
        facts=ask,
        retry_failed=options.retry_failed,
        patience_s=options.patience_s,
        contact_s=min(_CONTACT_S, options.patience_s),
        warn=lambda line: print(one_line(line), file=sys.stderr, flush=True),
    )


@contextlib.contextmanager
def _reported(dataset: Dataset, console: Console) -> Iterator[None]:
    """One line per group; on a terminal a bar below them."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        unit = "groups" if dataset.sample_n else "intervals kept"
        task = bar.add_task(unit, total=dataset.sample_n or dataset.target_n)

        def report(summary: Summary, line: str) -> None:
            console.print(shown(line))
            bar.update(
                task, completed=summary.groups if dataset.sample_n else summary.intervals_kept
            )

        dataset.report = report
        yield


def _result(summary: Summary, output: Path) -> tuple[Text, str]:
    counts = (
        f"{summary.groups} groups: {summary.intervals_kept} intervals kept, "
        f"{summary.intervals_dropped} dropped; {summary.failed} pairs failed"
    )
    short = "" if summary.complete else f"; {_why_short(output)}"
    return Text(counts, "bold"), f"{short} → {shown(output)}"


def _why_short(output: Path) -> str:
    failures = json.loads((output / layout.FAILED).read_text(encoding="utf-8"))
    if any(failure["trouble"] == "server" for failure in failures.values()):
        return "the same command tries again what a server failed on"
    return "there are no more pairs"
