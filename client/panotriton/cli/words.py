"""What commands print of names and errors: nothing that a terminal obeys, and no word without an end."""

from __future__ import annotations

import argparse
import math
import re
from typing import NoReturn

__all__ = ["Parser", "number", "one_line", "shown"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# Over 80 characters without the quotes and stops around them, so that nothing is cut twice.
_LONG = re.compile(r"""[^\s'"`(]\S{79,}[^\s'"`),;:.]|\S{100,}""")
_HEAD = 30  # characters of a long word, and 49 of its end: of a path that says most


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors repeat no more than the beginning and the end of a long argument."""

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def shown(name: object) -> str:
    r"""A name with its control characters written out, as \x1b."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(name))


def one_line(message: object) -> str:
    """A message on one line, each word of it at most 80 characters."""
    return _LONG.sub(lambda found: f"{found[0][:_HEAD]}…{found[0][_HEAD - 79 :]}", shown(message))


def number(value: float) -> str:
    """A score; - where there is none."""
    return "-" if math.isnan(value) else f"{value:.2f}"
