"""`panotriton export`: build what the server loads."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from panotriton.errors import ExportError
from panotriton.repository import copy_models

_EXAMPLES = """\
examples:
  panotriton export --preset small              the small weights that come with the project
  panotriton export --preset small --output /srv/models
"""


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = commands.add_parser(
        "export",
        help="build the model repository's weights",
        description="Turn PyTorch weights into the ONNX components and folders that the model "
        "repository loads, checking each against PyTorch.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=["small"], required=True, help="which weights to build")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("repository"),
        metavar="DIR",
        help="model repository to build, code and weights (%(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Export one preset."""
    try:
        from panotriton_export.presets import export_small  # noqa: PLC0415
    except ImportError as error:
        raise ExportError(
            f"exporting needs {error.name}: pip install 'panotriton[export]'"
        ) from error
    began = time.perf_counter()
    copy_models(options.output)
    export_small(options.output, report=lambda line: print(line, flush=True))
    print(f"exported to {options.output} in {time.perf_counter() - began:.0f} s")
    return 0
