"""`panotriton upscale`, `score`, `describe` and `crop`: one stage of the pipeline on images."""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from panotriton.cli.connection import (
    add_server_arguments,
    add_sr_arguments,
    command,
    connected,
    console_for,
    pipeline_options,
    print_json,
    spinner,
)
from panotriton.errors import InvalidInput, quoted
from panotriton.groups.agreement import Agreement, compare
from panotriton.pipeline.camera import CAMERA_FIELDS, Camera
from panotriton.pipeline.contract import DEFAULTS, SR_OPTIONS
from panotriton.pipeline.quality import MODES
from panotriton.pipeline.results import Score, Timings

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
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
        "  panotriton upscale *.jpg -o sharp --upscale 4 --align wavelet\n"
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
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="JPEG, PNG, WebP, or a folder of them"
    )
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
        "  panotriton describe view.png\n  panotriton describe *.png --json\n",
    )
    _add_images(parser)
    add_server_arguments(parser)
    parser.set_defaults(run=_run_describe)


def _add_crop(commands: Any) -> None:
    parser = command(
        commands,
        "crop",
        "crop views from a panorama",
        "Write what cameras see of a panorama: one PNG a camera.",
        "  panotriton crop a.jpg --camera 30,-10,0,90,0.4 -o views\n"
        "  panotriton crop a.jpg --camera=-90,0,0,60,0 --camera 90,0,0,60,0 -o views --size 1024\n",
    )
    parser.add_argument("panorama", type=Path, metavar="PANORAMA", help="JPEG, PNG, WebP")
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
    _add_output(parser)
    add_server_arguments(parser)
    parser.set_defaults(run=_run_crop)


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG, PNG, WebP")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the results"
    )


def _run_upscale(options: argparse.Namespace) -> int:
    paths = _targets(options.output, [path.stem for path in options.images])
    chosen = asdict(pipeline_options(options))
    arguments = {name: chosen[name] for name in SR_OPTIONS}
    results = _ask(options, "super-resolving", "upscale", options.images, **arguments)
    _write(options, paths, results)
    return 0


def _run_crop(options: argparse.Namespace) -> int:
    stems = [f"{options.panorama.stem}_{i:02d}" for i in range(1, len(options.camera) + 1)]
    paths = _targets(options.output, stems)
    results = _ask(options, "cropping", "crop", options.panorama, options.camera, size=options.size)
    _write(options, paths, results)
    return 0


def _run_score(options: argparse.Namespace) -> int:
    paths = [path for given in options.images for path in _images_in(given)]
    if options.compare:
        return _run_compare(options, paths)
    results = _ask(options, "scoring", "score", paths, mode=options.mode)
    if options.json:
        print_json([_entry(*pair) for pair in zip(paths, results, strict=True)])
        return 0
    table = Table("image", *_SCORES, box=None, header_style="bold")
    for path, score in zip(paths, results, strict=True):
        table.add_row(str(path), *(_number(getattr(score, name)) for name in _SCORES))
    console_for(options).print(table)
    return 0


def _run_compare(options: argparse.Namespace, paths: list[Path]) -> int:
    pipeline_options(options)
    scores = _in_every_mode(options, paths)
    finals = {mode: np.array([s.final for s in found]) for mode, found in scores.items()}
    found = {
        (one, other): compare(finals[one], finals[other], options.threshold)
        for one, other in itertools.combinations(MODES, 2)
    }
    if options.json:
        print_json([{"first": a, "second": b} | asdict(found[a, b]) for a, b in found])
        return 0
    columns = ("both pass", "both fail", "only first", "only second", "Spearman", "best threshold")
    table = Table("first", "second", *columns, box=None, header_style="bold")
    for modes, agreement in found.items():
        table.add_row(*modes, *_agreement_cells(agreement))
    console_for(options).print(f"{len(paths)} pairs at a threshold of {options.threshold:g}", table)
    return 0


def _in_every_mode(options: argparse.Namespace, paths: list[Path]) -> dict[str, list[Score]]:
    console = console_for(options)
    with connected(options, console) as client, spinner(console) as progress:
        progress.add_task("scoring in every mode")
        return {mode: client.score(paths, mode=mode) for mode in MODES}


def _agreement_cells(agreement: Agreement) -> list[str]:
    counts = (
        agreement.both_pass,
        agreement.both_fail,
        agreement.only_first,
        agreement.only_second,
    )
    best = f"{agreement.best_threshold:.3f} ({agreement.best_agreement:.0%} agree)"
    return [*map(str, counts), _number(agreement.spearman), best]


def _images_in(path: Path) -> list[Path]:
    """The file itself, or a folder's images by name."""
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)
    if not found:
        raise InvalidInput(f"{path} holds no image ({', '.join(_IMAGE_SUFFIXES)})")
    return found


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _run_describe(options: argparse.Namespace) -> int:
    results = _ask(options, "describing", "describe", options.images)
    if options.json:
        print_json([_entry(*pair) for pair in zip(options.images, results, strict=True)])
        return 0
    for path, result in zip(options.images, results, strict=True):
        print(f"{path}: {result.text or 'failed: ' + result.error}")
    return 0


def _ask(options: argparse.Namespace, doing: str, method: str, *arguments: Any, **more: Any) -> Any:
    console = console_for(options)
    with connected(options, console) as client, spinner(console) as progress:
        progress.add_task(doing)
        return getattr(client, method)(*arguments, **more)


def _write(options: argparse.Namespace, paths: list[Path], results: Any) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    for path, result in zip(paths, results, strict=True):
        result.image.save(path)
        if not options.json:
            print(f"{path}  {result.image.width}×{result.image.height}")
    if options.json:
        sizes = [result.image.size for result in results]
        print_json([{"path": str(p), "size": s} for p, s in zip(paths, sizes, strict=True)])


def _targets(folder: Path, stems: list[str]) -> list[Path]:
    """Where each result goes; two of one name are refused before any work."""
    twice = {stem for stem in stems if stems.count(stem) > 1}
    if twice:
        raise InvalidInput(
            f"several images are named {sorted(twice)[0]}: they would overwrite each other in {folder}; "
            "rename them, or run them into different folders"
        )
    return [folder / f"{stem}.png" for stem in stems]


def _entry(path: Path, result: Any) -> dict[str, Any]:
    timings: Timings = result.timings
    return {"image": str(path)} | asdict(result) | {"timings": asdict(timings)}


def _camera(text: str) -> Camera:
    try:
        return Camera.from_array([float(value) for value in text.split(",")])
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is no camera ({error}); expected {','.join(CAMERA_FIELDS)}"
        ) from error
