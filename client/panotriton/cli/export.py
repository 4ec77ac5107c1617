"""`panotriton export`: build what the server loads."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

from panotriton.errors import ExportError
from panotriton.repository import copy_models

_EXAMPLES = """\
examples:
  panotriton export --preset small                 the small weights that come with the project
  panotriton export --preset small --output /srv/models
  panotriton export osediff --base stable-diffusion-2-1-base --checkpoint osediff.pkl
  panotriton export osediff --base SD21 --checkpoint osediff.pkl --precision fp16 --provider cuda
  panotriton export qwen --model Qwen2.5-VL-7B-Instruct --dtype bf16 --max-pixels 1003520
"""


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = commands.add_parser(
        "export",
        help="build the model repository's weights",
        description="Turn PyTorch weights into the ONNX components and folders that the model "
        "repository loads, checking each against PyTorch. A real deployment runs `osediff` and "
        "`qwen`, in any order, into the same --output.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=["small"], help="weights that need no download")
    _add_output(parser)
    parser.set_defaults(run=_run_preset)
    parts = parser.add_subparsers(metavar="PART", title="parts")
    _add_osediff(parts)
    _add_qwen(parts)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("repository"),
        metavar="DIR",
        help="model repository to build, code and weights (%(default)s)",
    )


def _add_osediff(parts: Any) -> None:
    parser = parts.add_parser(
        "osediff",
        help="export Stable Diffusion 2.1-base with OSEDiff's adapters",
        description="Merge osediff.pkl into the base, export the four networks to ONNX and compare "
        "each, and one whole image, with PyTorch.",
    )
    parser.add_argument("--base", type=Path, required=True, help="Stable Diffusion 2.1-base folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="osediff.pkl")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument(
        "--provider",
        choices=["cpu", "cuda", "tensorrt"],
        default="cpu",
        help="what runs the networks; written to their configs (%(default)s)",
    )
    _add_output(parser)
    parser.set_defaults(run=_run_osediff)


def _add_qwen(parts: Any) -> None:
    parser = parts.add_parser(
        "qwen",
        help="serve a Qwen-VL folder",
        description="Point the repository at a Hugging Face folder of Qwen2-VL, Qwen2.5-VL or "
        "Qwen3-VL. The folder is checked and used where it lies; no code in it is run.",
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--prompt-file", type=Path, help="quality prompt, instead of the default")
    parser.add_argument("--max-pixels", type=int, help="an image's pixel budget in the processor")
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    _add_output(parser)
    parser.set_defaults(run=_run_qwen)


def _run_preset(options: argparse.Namespace) -> int:
    if options.preset is None:
        raise ExportError("nothing to export: give --preset small, or a part (see --help)")
    presets = _export_code("presets")
    return _timed(options, lambda: presets.export_small(options.output, report=_report))


def _run_osediff(options: argparse.Namespace) -> int:
    osediff = _export_code("osediff")

    def work() -> None:
        osediff.export_osediff(
            options.base,
            options.checkpoint,
            options.output,
            precision=options.precision,
            provider=options.provider,
            report=_report,
        )

    return _timed(options, work)


def _run_qwen(options: argparse.Namespace) -> int:
    qwen = _export_code("qwen")

    def work() -> None:
        qwen.export_qwen(
            options.model,
            options.output,
            prompt_file=options.prompt_file,
            max_pixels=options.max_pixels,
            dtype=options.dtype,
            report=_report,
        )

    return _timed(options, work)


def _export_code(module: str) -> Any:
    try:
        return importlib.import_module(f"panotriton_export.{module}")
    except ImportError as error:
        raise ExportError(
            f"exporting needs {error.name}: pip install 'panotriton[export]'"
        ) from error


def _timed(options: argparse.Namespace, work: Any) -> int:
    began = time.perf_counter()
    copy_models(options.output)
    work()
    print(f"exported to {options.output} in {time.perf_counter() - began:.0f} s")
    return 0


def _report(line: str) -> None:
    print(line, flush=True)
