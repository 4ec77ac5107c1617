"""`panotriton upscale`, `score`, `describe` and `crop`: one stage of the pipeline on images."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from panotriton.cli.connection import (
    add_server_arguments,
    add_sphere_option,
    add_sr_arguments,
    command,
    connected,
    console_for,
    pipeline_options,
    print_json,
    spinner,
)
from panotriton.cli.many import Results, ask_each
from panotriton.cli.places import check_folder, is_folder, save
from panotriton.cli.words import number, shown
from panotriton.client.aio import AsyncClient
from panotriton.errors import InferenceFailed, InvalidInput, brief, quoted
from panotriton.groups.agreement import Agreement, compare
from panotriton.pipeline.camera import CAMERA_FIELDS, Camera
from panotriton.pipeline.contract import DEFAULTS, SR_OPTIONS
from panotriton.pipeline.images import FORMATS, SUFFIXES, images_in
from panotriton.pipeline.quality import MODES
from panotriton.pipeline.results import (
    Cropped,
    Description,
    Score,
    Timings,
    Upscaled,
    warning_field,
)

_SR_AT_ONCE, _QWEN_AT_ONCE = 4, 16
_SCORES = ("final", "correlation", "balance", "richness", "clarity", "coherence")


def add_parsers(commands: Any) -> None:
    """Add the four commands to the argument parser."""
    _add_upscale(commands)
    _add_score(commands)
    _add_describe(commands)
    _add_crop(commands)


def _add_upscale(commands: Any) -> None:
    parser = command(
        commands,
        "upscale",
        "super-resolve images",
        "Super-resolve images of any sizes and write each as a PNG of the same name.",
        "  panotriton upscale photo.jpg -o sharp\n"
        "  panotriton upscale photos -o sharp --upscale 4 --align wavelet\n"
        "  panotriton upscale photo.jpg -o sharp --local\n",
    )
    _add_images(parser)
    _add_output(parser)
    add_sr_arguments(parser)
    add_server_arguments(parser)
    parser.set_defaults(run=_run_upscale)


def _add_score(commands: Any) -> None:
    parser = command(
        commands,
        "score",
        "score pair images",
        "Score images that show a left and a right view side by side: 0 to 1, - where there is none.",
        "  panotriton score out/group_0001/osediff/*.jpg\n"
        "  panotriton score pair.png --json\n"
        "  panotriton score out/group_0001/osediff --mode expected\n"
        "  panotriton score out/*/osediff --compare --threshold 0.7\n",
    )
    _add_images(parser)
    parser.add_argument(
        "--mode",
        choices=list(MODES),
        default="generate",
        help="generate: the model writes its reply; expected, levels: one pass, other scores, no "
        "sub-scores (%(default)s)",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="score in every mode, and say how far they agree instead of the scores",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=DEFAULTS.threshold,
        help="for --compare, 0 to 1 (%(default)s)",
    )
    add_server_arguments(parser)
    parser.set_defaults(run=_run_score)


def _add_describe(commands: Any) -> None:
    parser = command(
        commands,
        "describe",
        "describe images",
        "Describe images in two or three sentences each.",
        "  panotriton describe view.png\n  panotriton describe out/group_0001/osediff --json\n",
    )
    _add_images(parser)
    add_server_arguments(parser)
    parser.set_defaults(run=_run_describe)


def _add_crop(commands: Any) -> None:
    parser = command(
        commands,
        "crop",
        "crop views from a panorama",
        "Write what cameras see of a panorama: one PNG per camera.",
        "  panotriton crop a.jpg --camera 30,-10,0,90,0.4 -o views --sphere 0\n"
        "  panotriton crop a.jpg --camera=-90,0,0,60,0 --camera 90,0,0,60,0 -o views --size 1024\n",
    )
    parser.add_argument("panorama", type=Path, metavar="PANORAMA", help=FORMATS)
    parser.add_argument(
        "--camera",
        action="append",
        required=True,
        type=_camera,
        metavar=",".join(CAMERA_FIELDS).upper(),
        help="degrees, and xi 0 to 1; may be repeated",
    )
    parser.add_argument(
        "--size", type=int, default=DEFAULTS.crop_size, help="side in px (%(default)s)"
    )
    add_sphere_option(parser)
    _add_output(parser)
    add_server_arguments(parser)
    parser.set_defaults(run=_run_crop)


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help=f"{FORMATS}, or a folder of them"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the results"
    )


def _run_upscale(options: argparse.Namespace) -> int:
    images = _images(options)
    targets = dict(zip(images, _targets(options.output, [p.stem for p in images]), strict=True))
    _spare(images, targets.values())
    check_folder(options.output)
    chosen = pipeline_options(options).chosen()
    arguments = {name: chosen[name] for name in SR_OPTIONS}

    def ask(client: AsyncClient, path: Path) -> Awaitable[Any]:
        return client.upscale(path, **arguments)

    with Results(options) as results:

        def take(path: Path, result: Upscaled) -> None:
            line, item = _write(targets[path], result)
            results.add(line, item | warning_field(result.warning))
            results.warn(result.warning)

        ask_each(options, "super-resolving", targets, ask, take, results, at_once=_SR_AT_ONCE)
    return results.code


def _run_crop(options: argparse.Namespace) -> int:
    stems = [f"{options.panorama.stem}_{i:02d}" for i in range(1, len(options.camera) + 1)]
    paths = _targets(options.output, stems)
    check_folder(options.output)
    console = console_for(options)
    with connected(options, console) as client, spinner(console) as progress:
        progress.add_task("cropping")
        views = client.crop(
            options.panorama, options.camera, size=options.size, sphere_size=options.sphere_size
        )
    with Results(options) as results:
        for path, view in zip(paths, views, strict=True):
            results.add(*_write(path, view))
    return 0


def _run_score(options: argparse.Namespace) -> int:
    pipeline_options(options)
    paths = _images(options)
    if options.compare:
        return _run_compare(options, paths)
    # Those that cannot be opened get no row.
    width = max((len(shown(p)) for p in paths if os.path.isfile(p)), default=0)  # noqa: PTH113

    def take(path: Path, score: Score) -> None:
        numbers = [number(getattr(score, name)) for name in _SCORES]
        results.add(_row(shown(path), width, numbers), _entry(path, score))

    with Results(options, head=Text(_row("image", width, _SCORES), "bold")) as results:
        _score_each(options, paths, options.mode, take, results)
    return results.code


def _row(name: str, width: int, cells: Sequence[str]) -> str:
    columns = (f"{cell:<{len(title)}}" for title, cell in zip(_SCORES, cells, strict=True))
    return f" {name:<{width}}  {'  '.join(columns)}".rstrip()


def _score_each(
    options: argparse.Namespace,
    paths: Iterable[Path],
    mode: str,
    take: Callable[[Path, Score], None],
    results: Results,
) -> None:
    def ask(client: AsyncClient, path: Path) -> Awaitable[Any]:
        return client.score(path, mode=mode)

    ask_each(options, "scoring", paths, ask, take, results, at_once=_QWEN_AT_ONCE)


def _run_compare(options: argparse.Namespace, paths: list[Path]) -> int:
    scores, code = _in_every_mode(options, paths)
    finals = {mode: np.array([s.final for s in found]) for mode, found in scores.items()}
    found = {
        (one, other): compare(finals[one], finals[other], options.threshold)
        for one, other in itertools.combinations(MODES, 2)
    }
    if options.json:
        print_json([{"first": a, "second": b} | asdict(found[a, b]) for a, b in found])
        return code
    columns = ("both pass", "both fail", "only first", "only second", "Spearman", "best threshold")
    table = Table("first", "second", *columns, box=None, header_style="bold")
    for modes, agreement in found.items():
        table.add_row(*modes, *_agreement_cells(agreement))
    count = len(finals["generate"])
    console_for(options).print(f"{count} pairs at a threshold of {options.threshold:g}", table)
    return code


def _in_every_mode(
    options: argparse.Namespace, paths: list[Path]
) -> tuple[dict[str, list[Score]], int]:
    """The scores of the pairs that all modes could score, and the exit code."""
    found: dict[str, dict[Path, Score]] = {mode: {} for mode in MODES}
    results = Results(argparse.Namespace(json=False))
    for mode, scores in found.items():
        _score_each(options, paths, mode, scores.__setitem__, results)
    scored = [path for path in paths if all(path in scores for scores in found.values())]
    return {mode: [scores[path] for path in scored] for mode, scores in found.items()}, results.code


def _agreement_cells(agreement: Agreement) -> list[str]:
    counts = (
        agreement.both_pass,
        agreement.both_fail,
        agreement.only_first,
        agreement.only_second,
    )
    best = f"{agreement.best_threshold:.3f} ({agreement.best_agreement:.0%} agree)"
    return [*map(str, counts), number(agreement.spearman), best]


def _run_describe(options: argparse.Namespace) -> int:
    images = _images(options)

    def ask(client: AsyncClient, path: Path) -> Awaitable[Any]:
        return client.describe(path)

    def take(path: Path, result: Description) -> None:
        if result.error:
            raise InferenceFailed(result.error)
        results.add(f"{shown(path)}: {result.text}", _entry(path, result))

    with Results(options) as results:
        ask_each(options, "describing", images, ask, take, results, at_once=_QWEN_AT_ONCE)
    return results.code


def _images(options: argparse.Namespace) -> list[Path]:
    """The files that were named, and those of each folder by name."""
    return [path for given in options.images for path in _images_in(given)]


def _images_in(path: Path) -> list[Path]:
    if not is_folder(path):
        return [path]
    found = images_in(path)
    if not found:
        raise InvalidInput(f"{brief(path)} holds no image ({', '.join(SUFFIXES)})")
    return found


def _write(path: Path, result: Upscaled | Cropped) -> tuple[str, dict[str, Any]]:
    """Save the picture; what is printed of it, as a line and as JSON."""
    save(result.image, path)
    width, height = result.image.size
    return f"{shown(path)}  {width}×{height}", {"path": str(path), "size": [width, height]}


def _targets(folder: Path, stems: list[str]) -> list[Path]:
    """Where each result goes; two of one name are refused before any work."""
    twice = {stem for stem in stems if stems.count(stem) > 1}
    if twice:
        raise InvalidInput(
            f"several images are named {brief(sorted(twice)[0])}: they would overwrite each other in "
            f"{brief(folder)}; "
            "rename them, or run them into different folders"
        )
    return [folder / f"{stem}.png" for stem in stems]


def _spare(images: Iterable[Path], targets: Iterable[Path]) -> None:
    """Raise InvalidInput where a result would take the place of an image that it is made of."""
    given = {os.path.realpath(image): image for image in images}
    for target in targets:
        if image := given.get(os.path.realpath(target)):
            raise InvalidInput(
                f"the result would overwrite {brief(image)} itself; name another folder as --output"
            )


def _entry(path: Path, result: Any) -> dict[str, Any]:
    timings: Timings = result.timings
    return {"image": str(path)} | asdict(result) | {"timings": asdict(timings)}


def _camera(text: str) -> Camera:
    values = text.split(",")
    try:
        if len(values) != len(CAMERA_FIELDS):
            raise ValueError(f"{len(values)} numbers")
        return Camera.from_array([float(value) for value in values])
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is no camera ({error}); expected {','.join(CAMERA_FIELDS)}"
        ) from error
