"""The scorer's reply: six lines of text, read strictly."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

__all__ = ["SUB_SCORES", "Quality", "parse_reply"]

_LINES = {
    "correlation": "correlation",
    "information": "balance",
    "subject": "richness",
    "image clarity": "clarity",
    "content coherence": "coherence",
    "final score": "final_score",
}
SUB_SCORES = tuple(_LINES.values())[:-1]
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?|[+-]?\.\d+")


@dataclass(frozen=True, slots=True)
class Quality:
    """One pair's scores, each 0 to 1 or NaN where the reply has none."""

    correlation: float = math.nan
    balance: float = math.nan
    richness: float = math.nan
    clarity: float = math.nan
    coherence: float = math.nan
    final_score: float = math.nan

    def sub_scores(self) -> tuple[float, ...]:
        """The five scores before the final one, in the order of `SUB_SCORES`."""
        return tuple(getattr(self, field.name) for field in fields(self))[:-1]


def parse_reply(reply: str) -> Quality:
    """Read the lines that start with Correlation, Information, Subject, Image Clarity, Content
    Coherence and Final Score, in any case.

    The value follows the first colon (ASCII or full-width); brackets and a trailing `Reason…` are
    stripped. Anything that is then not one number from 0 to 1 is no score: a range, a fraction, a
    percentage or a word never becomes one. Where a line comes twice, the last one counts.
    """
    scores: dict[str, float] = {}
    for line in reply.splitlines():
        text = line.strip().lstrip("*#-• ").casefold()
        for start, name in _LINES.items():
            if text.startswith(start):
                scores[name] = _value(text)
    return Quality(**scores)


def _value(line: str) -> float:
    _, colon, value = line.replace("：", ":").partition(":")
    value = value.partition("reason")[0]
    # A dash may end the value ("0.8 - reason") but never begin it: -0.8 is no score.
    value = value.lstrip(" \t[({<*_`").rstrip(" \t])}>*_`,;.。(-–—")
    if not colon or not _NUMBER.fullmatch(value):
        return math.nan
    number = float(value)
    return number if 0.0 <= number <= 1.0 else math.nan
