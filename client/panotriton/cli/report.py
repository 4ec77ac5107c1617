"""`panotriton report`: a group's folder to one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from panotriton.cli.places import check_file
from panotriton.cli.words import shown
from panotriton.groups import layout
from panotriton.groups.report import write_index, write_report

_EXAMPLES = """\
examples:
  panotriton report out/group_0001                       writes out/group_0001/report.html
  panotriton report out/group_0001 -o page.html
  panotriton report out                                  every group of a run, and out/index.html over them
"""


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = commands.add_parser(
        "report",
        help="write a group as one HTML page",
        description="Write one self-contained HTML file over a group's folder: scores, before and after, "
        "sequences, where the cameras look and what took the time. It asks the network for nothing.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a group's, or one that holds groups"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="(report.html or index.html in FOLDER)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the page of a group, or those of all groups and their index."""
    if options.output:
        check_file(options.output)
    if layout.is_group(options.folder):
        _show(write_report(options.folder, options.output))
        return 0
    for folder in layout.group_folders(options.folder):
        _show(write_report(folder))
    _show(write_index(options.folder, options.output))
    return 0


def _show(path: Path) -> None:
    print(f"{shown(path)}  {path.stat().st_size / 1e6:.1f} MB", flush=True)
