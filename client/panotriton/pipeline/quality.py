"""What is asked of the scorer, how its answer is read, six lines of text, strictly, or one number, and
which intervals are kept by it.

Knows no engine: the readings below are of probabilities that an engine has computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InvalidInput
from panotriton.pipeline.contract import DEFAULTS, INTERVALS, TENSORS, Options

__all__ = [
    "LEVELS",
    "LEVEL_SKELETON",
    "MODES",
    "NUMBER_SKELETON",
    "SUB_SCORES",
    "Quality",
    "expected_level",
    "expected_number",
    "filter_intervals",
    "finite_or_none",
    "parse_reply",
    "through_line",
]

# What a caller asks of the scorer → what the scorer asks of the engine.
MODES = {"generate": "text", "expected": "number", "levels": "levels"}

NUMBER_SKELETON = "Final Score: 0."
LEVEL_SKELETON = "The quality of the pair is"
# What follows it, each with its weight.
LEVELS = {" excellent": 1.0, " good": 0.75, " fair": 0.5, " poor": 0.25, " bad": 0.0}
_SECOND_DECIMAL = 0.045  # the mean of what follows the first

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


def finite_or_none(score: float) -> float | None:
    """The score for JSON, which has no NaN: None where there is none."""
    return score if math.isfinite(score) else None


def expected_number(one: float, tenths: Sequence[float]) -> float:
    """E = P(1) + P(0) · (Σ d/10 · P(d) + 0.045): `one` is P(1) against 0 before the point, tenths are
    P(0) to P(9) after it."""
    below_one = sum(digit / 10 * share for digit, share in enumerate(tenths)) + _SECOND_DECIMAL
    return one + (1 - one) * below_one


def expected_level(shares: Sequence[float]) -> float:
    """The mean weight of `LEVELS` under their probabilities, 0 to 1."""
    return sum(weight * share for weight, share in zip(LEVELS.values(), shares, strict=True))


def parse_reply(reply: str) -> Quality:
    """Read the lines that start with Correlation, Information, Subject, Image Clarity, Content
    Coherence and Final Score, in any case.

    The value follows the first colon (ASCII or full-width); brackets and a trailing `Reason…` are
    stripped. Anything that is then not one number from 0 to 1 is no score: a range, a fraction, a
    percentage or a word never becomes one. A line without a colon says nothing. Where one comes twice,
    the last one counts.
    """
    scores: dict[str, float] = {}
    for line in reply.splitlines():
        text = line.strip().lstrip("*#-• ").casefold()
        for start, name in _LINES.items():
            if text.startswith(start) and _has_value(text):
                scores[name] = _value(text)
    return Quality(**scores)


def through_line(text: str, start: str) -> str | None:
    """`text` up to the end of its first whole line that starts with `start`, in any case, and has a value.

    None where there is none yet: the last line may still be being written.
    """
    end = 0
    for line in text.splitlines(keepends=True):
        end += len(line)
        begun = line.strip(" *#-").casefold().startswith(start.casefold())
        if begun and _has_value(line) and line.endswith("\n"):
            return text[:end]
    return None


def _has_value(line: str) -> bool:
    return ":" in line or "：" in line


def _value(line: str) -> float:
    _, colon, value = line.replace("：", ":").partition(":")
    value = value.partition("reason")[0]
    # A dash may end the value ("0.8 - reason") but never begin it: -0.8 is no score.
    value = value.lstrip(" \t[({<*_`").rstrip(" \t])}>*_`,;.。(-–—")
    if not colon or not _NUMBER.fullmatch(value):
        return math.nan
    number = float(value)
    return number if 0.0 <= number <= 1.0 else math.nan


def filter_intervals(
    scores: NDArray[np.float32], threshold: float = DEFAULTS.threshold
) -> NDArray[np.int32]:
    """Interval ids (1…8) whose lowest score over both panoramas reaches the threshold.

    scores: (16,) as `make_pairs` orders them. NaN is "no score": an interval is judged by its valid
    scores alone and dropped where it has none.
    """
    if scores.shape != (2 * INTERVALS,):
        raise InvalidInput(
            f"SCORE has shape {scores.shape}; expected ({2 * INTERVALS},), one per pair"
        )
    Options(threshold=threshold).check(TENSORS)
    by_panorama = scores.reshape(2, INTERVALS)
    lowest = np.fmin(by_panorama[0], by_panorama[1])  # NaN only where both are
    # float32 scores against a float32 threshold: 0.7 must reach 0.7.
    return np.flatnonzero(lowest >= np.float32(threshold)).astype(np.int32) + 1
