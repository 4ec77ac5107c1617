"""What a tagger sees in an image, as the words of a prompt.

The tagger is RAM ("Recognize Anything: A Strong Image Tagging Model", Zhang et al., 2023) with the
adapter DAPE, which makes it robust to degraded images ("SeeSR: Towards Semantics-Aware Real-World
Image Super-Resolution", Wu et al., CVPR 2024). It is optional.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from panotriton.pipeline.files import TAGS
from panotriton.pipeline.scratch import atomic

__all__ = ["TAGGED_PX", "Tags", "tagger_input"]

TAGGED_PX = 384

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tags:
    """Names and the probabilities above which they count, in the order of the tagger's outputs."""

    names: tuple[str, ...]
    thresholds: F32  # (T,)

    @classmethod
    def read(cls, folder: Path) -> Tags | None:
        """What `write` wrote into a folder, or None where it wrote nothing."""
        path = folder / TAGS
        if not path.is_file():
            return None
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(tuple(content["names"]), np.array(content["thresholds"], np.float32))

    def write(self, folder: Path) -> None:
        """Write tags.json, whose presence says that there is a tagger."""
        content = {"names": self.names, "thresholds": [round(float(t), 6) for t in self.thresholds]}
        with atomic(folder / TAGS) as part:
            part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def prompt(self, probabilities: F32, user_prompt: str) -> str:
        """`sky, tree, USER PROMPT,`: upstream's form, its commas included, from probabilities (T,)."""
        found = np.flatnonzero(probabilities > self.thresholds)
        return f"{', '.join(self.names[index] for index in found)}, {user_prompt},"


def tagger_input(image: U8) -> U8:
    """One RGB image (H, W, 3) → (384, 384, 3), whatever its aspect.

    Bilinear without antialiasing, as torchvision 0.15 (OSEDiff's) resizes tensors; later ones antialias.
    """
    return np.asarray(cv2.resize(image, (TAGGED_PX, TAGGED_PX), interpolation=cv2.INTER_LINEAR))
