"""ram_tag_list.txt and ram_tag_list_threshold.txt: a name and a threshold a line, in the network's order.

Both lie in ram/data/ of github.com/xinyu1205/recognize-anything (and of OSEDiff), Apache-2.0. A threshold
of 1, which no probability exceeds, is how they leave a tag out; OSEDiff deletes none besides.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from panotriton.errors import quoted
from panotriton.models.tags import Tags
from panotriton_export.pickles import CheckpointError

__all__ = ["read_tags"]


def read_tags(names: Path, thresholds: Path, count: int) -> Tags:
    """The tags of a network with `count` outputs. Raises CheckpointError where they do not fit it."""
    words = _lines(names, count, "ram_tag_list.txt")
    empty = [index for index, word in enumerate(words, 1) if not word]
    if empty:
        raise CheckpointError(f"{names}, line {empty[0]} is empty; expected a tag's name")
    texts = _lines(thresholds, count, "ram_tag_list_threshold.txt")
    values = [_threshold(text, thresholds, line) for line, text in enumerate(texts, 1)]
    return Tags(tuple(words), np.array(values, np.float32))


def _lines(path: Path, count: int, expected: str) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; expected {expected}") from error
    if len(lines) != count:
        raise CheckpointError(
            f"{path} has {len(lines)} lines but the checkpoint {count} tags; expected the {expected} "
            "that belongs to it"
        )
    return [line.strip() for line in lines]


def _threshold(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise CheckpointError(
            f"{path}, line {line} is {quoted(text)}; expected a number from 0 to 1"
        )
    return value
