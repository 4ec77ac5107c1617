"""The few shapes that a network is to see, as two parameters of its config.pbtxt.

`fixed_batches`, as "1,4,8": batches are filled up with rows of zeros to one of these sizes.
`expected_shapes`, as "LATENT 8x4x96x96, PROMPT_EMBEDS 8x77x1024; LATENT …": the inputs of whole batches,
which are opened and run once at load. Other shapes work; what they need is opened when they come.

Why: each new shape costs a library on a GPU up to seconds, for a search among its algorithms, and some of
them search again whenever the shape differs from that of the call before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from panotriton.errors import EngineError

__all__ = ["BATCHES", "EXPECTED", "FixedShapes", "Shapes", "text_of"]

Shapes = Mapping[str, tuple[int, ...]]
"""Those of a graph's inputs, by name."""

BATCHES, EXPECTED = "fixed_batches", "expected_shapes"
_SHAPE = re.compile(r"([^\s,;]+) (\d+(?:x\d+)*)")


@dataclass(frozen=True, slots=True)
class FixedShapes:
    """batches: sizes, the largest last; expected: the inputs' shapes, batch first."""

    batches: tuple[int, ...]
    expected: tuple[Shapes, ...] = ()

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> FixedShapes | None:
        """What a config's parameters say; None where they fix nothing. Raises EngineError."""
        text = parameters.get(BATCHES, "")
        if not text:
            return None
        sizes = [int(each) for each in text.split(",") if each.strip().isdecimal()]
        if len(sizes) != text.count(",") + 1 or sizes != sorted(set(sizes)) or not sizes[0]:
            raise EngineError(f"parameter {BATCHES} is '{text}', expected rising numbers as 1,4,8")
        return cls(tuple(sizes), tuple(_read(parameters.get(EXPECTED, ""))))

    def rows(self, rows: int) -> int:
        """The batch size that so many rows are filled up to; their own where none is as large."""
        return next((size for size in self.batches if size >= rows), rows)


def _read(text: str) -> Iterable[Shapes]:
    for batch in filter(None, map(str.strip, text.split(";"))):
        found = [_SHAPE.fullmatch(each.strip()) for each in batch.split(",")]
        if None in found:
            raise EngineError(
                f"parameter {EXPECTED} has '{batch}', expected names and shapes as "
                "LATENT 8x4x96x96, PROMPT_EMBEDS 8x77x1024; …"
            )
        yield {each[1]: tuple(map(int, each[2].split("x"))) for each in found if each}


def text_of(shapes: Sequence[Shapes]) -> str:
    """`expected_shapes` for them."""
    return "; ".join(
        ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in each.items())
        for each in shapes
    )
