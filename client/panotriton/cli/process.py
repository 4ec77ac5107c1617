"""`panotriton process`: two panoramas to a group folder."""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from panotriton import __version__
from panotriton.cli.connection import (
    add_pipeline_arguments,
    add_server_arguments,
    client_options,
    command,
    connected,
    console_for,
    pipeline_options,
    print_json,
    spinner,
    warn,
)
from panotriton.cli.facts import facts
from panotriton.cli.places import check_folder, save
from panotriton.cli.words import number, shown
from panotriton.client.client import Client
from panotriton.errors import InvalidInput, PanotritonError, brief
from panotriton.groups.folder import base_name, process_command, write_group
from panotriton.groups.report import write_report
from panotriton.pipeline.camera import Camera, Sphere, sample_cameras
from panotriton.pipeline.contract import check_seed
from panotriton.pipeline.images import FORMATS, decode_image
from panotriton.pipeline.networks import NETWORKS, PIPELINE
from panotriton.pipeline.results import Group, Health, StageTime, warning_field
from panotriton.pipeline.stages import ORDER, is_part

_EXAMPLES = """\
  panotriton process a.jpg b.jpg -o out                  by the server at localhost:8001
  panotriton process a.jpg b.jpg -o out --local          start a server for this run alone
  panotriton process a.jpg b.jpg -o out --seed 7 --threshold 0.6 --interpolations 4
  panotriton process a.jpg b.jpg -o out --report         and one HTML page over it
  panotriton process a.jpg b.jpg -o out --preview        and its first pair after seconds
  panotriton process a.jpg b.jpg -o out --json           one JSON object on stdout
"""
_POLL_S = 0.5


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = command(
        commands,
        "process",
        "run the pipeline on two panoramas",
        "Send two panoramas through the whole pipeline as one request and write the "
        "group's folder: pairs, scores, descriptions and the sequences of the kept intervals.",
        _EXAMPLES,
    )
    parser.add_argument("panoramas", nargs=2, type=Path, metavar="PANORAMA", help=FORMATS)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the group")
    parser.add_argument("--seed", type=int, default=0, help="of the cameras (%(default)s)")
    parser.add_argument("--report", action="store_true", help="write the group's report.html, too")
    parser.add_argument(
        "--preview", action="store_true", help="write the first pair, preview.jpg, before the group"
    )
    add_pipeline_arguments(parser)
    add_server_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Process one pair of panoramas and write its folder."""
    began = time.perf_counter()
    for path in options.panoramas:
        if not os.path.isfile(path):  # noqa: PTH113 false of names that no file can have, too
            raise InvalidInput(f"{brief(path)} is not a file; expected a panorama ({FORMATS})")
    chosen = {"seed": options.seed, **pipeline_options(options).chosen()}
    check_seed("--seed", options.seed)
    check_folder(options.output)
    bases = (base_name(options.panoramas[0]), base_name(options.panoramas[1]))
    console = console_for(options)
    with connected(options, console) as client:
        health = client.health()
        if options.preview:
            path = _preview(client, options)
            seconds = time.perf_counter() - began
            console.print(f"first pair, {seconds:.1f} s → {shown(path)}", soft_wrap=True)
        group, stages = _process(client, options, chosen, console)
    about = _about(options, chosen, group, stages, health)
    folder = write_group(group, options.output, bases, about)
    warn(group.warning)
    report = write_report(folder) if options.report else None
    if options.json:
        print_json(_summary(group, folder, stages, report))
    else:
        _show(console, group, folder, stages)
        if report:
            console.print(shown(report), soft_wrap=True)
    return 0


def _preview(client: Client, options: argparse.Namespace) -> Path:
    """The group's first pair, super-resolved alone; written a group's time before the group."""
    path = options.panoramas[0]
    panorama = decode_image(brief(path), path.read_bytes())
    sphere = Sphere(panorama, options.crop_size, options.sphere_size)
    rows = sample_cameras(options.seed)[0, 0]  # left, right
    pair = np.concatenate([sphere.crop(Camera.from_array(row)) for row in rows], axis=1)
    sharp = client.upscale(
        pair, upscale=options.upscale, align=options.align, prompt=options.prompt
    )
    preview: Path = options.output / "preview.jpg"
    save(sharp.image, preview, quality=92)
    return preview


def _process(
    client: Client, options: argparse.Namespace, chosen: dict[str, Any], console: Console
) -> tuple[Group, list[StageTime]]:
    before = client.statistics()
    watching = _watch(client, options, before, spinner(console))
    with watching if console.is_terminal else contextlib.nullcontext():
        group = client.process(*options.panoramas, intermediates=True, **chosen)
    return group, _difference(before, client.statistics())


@contextlib.contextmanager
def _watch(
    client: Client, options: argparse.Namespace, before: dict[str, StageTime], progress: Progress
) -> Iterator[None]:
    """Show which stage the server is at, read from its statistics on a connection of its own."""
    task = progress.add_task("sending the panoramas")
    done = threading.Event()

    def poll() -> None:
        more = client_options(options)
        with Client(client.url, protocol=client.protocol, **more) as watcher:
            while not done.wait(_POLL_S):
                with contextlib.suppress(PanotritonError):
                    stages = {s.model: s for s in _difference(before, watcher.statistics())}
                    progress.update(task, description=_stage(stages))

    thread = threading.Thread(target=poll, daemon=True)
    with progress:
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _stage(stages: dict[str, StageTime]) -> str:
    decoder = NETWORKS[PIPELINE].decoder  # the last that an image leaves
    images = stages[decoder].inferences if decoder in stages else 0
    if "interpolate" in stages:
        return f"super-resolving in-between views: {max(images - 16, 0)} done"
    if "qwen_scorer" in stages:
        return "describing and interpolating"
    if "osediff" in stages:
        return "scoring 16 pairs"
    return f"super-resolving pairs: {images} of 16" if "preprocess" in stages else "cropping pairs"


def _difference(before: dict[str, StageTime], after: dict[str, StageTime]) -> list[StageTime]:
    """What was done between two readings, models in the order of the pipeline."""
    stages = [
        StageTime(
            name,
            now.executions - was.executions,
            now.inferences - was.inferences,
            now.queue_ms - was.queue_ms,
            now.compute_ms - was.compute_ms,
        )
        for name, now in after.items()
        if (was := before.get(name, StageTime(name, 0, 0, 0.0, 0.0)))
    ]
    done = [stage for stage in stages if stage.executions and stage.model in ORDER]
    return sorted(done, key=lambda stage: ORDER[stage.model])


def _about(
    options: argparse.Namespace,
    chosen: dict[str, Any],
    group: Group,
    stages: list[StageTime],
    health: Health,
) -> dict[str, Any]:
    more = ("--local",) if options.local else ()
    return {
        "panoramas": [str(path) for path in options.panoramas],
        "options": chosen,
        "version": __version__,
        **facts(health, options.repository if options.local else None),
        "command": process_command(options.panoramas, chosen, str(options.output), *more),
        "seconds": round(group.seconds, 3),
        "stages": [asdict(stage) for stage in stages],
    }


def _summary(
    group: Group, folder: Path, stages: list[StageTime], report: Path | None
) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "report": str(report) if report else None,
        "kept": list(group.kept),
        "images": group.image_count,
        "seconds": round(group.seconds, 3),
        "stages": [asdict(stage) for stage in stages],
        **warning_field(group.warning),
    }


def _show(console: Console, group: Group, folder: Path, stages: list[StageTime]) -> None:
    table = Table("stage", "calls", "rows", "queue s", "compute s", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in stages:
        name = f"  {stage.model}" if is_part(stage.model) else stage.model
        times = (f"{stage.queue_ms / 1e3:.2f}", f"{stage.compute_ms / 1e3:.2f}")
        table.add_row(name, str(stage.executions), str(stage.inferences), *times)
    console.print(table)
    console.print(_intervals(group))
    if group.intervals:
        per = len(group.intervals[0].sequences[0].images)
        result = f"{len(group.kept)} of 8 intervals kept, {group.image_count} images in sequences of {per}"
    else:
        result = "no interval reached the threshold: nothing to interpolate"
    console.print(Text(result, "bold"), f", {group.seconds:.1f} s → {shown(folder)}", sep="")


def _intervals(group: Group) -> Table:
    table = Table("interval", "panorama 1", "panorama 2", "", box=None, header_style="bold")
    for first, second in zip(group.pairs[:8], group.pairs[8:], strict=True):
        scores = [number(pair.quality.final_score) for pair in (first, second)]
        kept = "kept" if first.interval in group.kept else "dropped"
        table.add_row(str(first.interval), *scores, kept)
    return table
