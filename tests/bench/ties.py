"""How close the words of a reply are to others, against what the rest of a batch does to a float.

    python tests/bench/ties.py --seconds 120

Greedy decoding takes the likelier word. Where two are as near to one another as float rounding, what else is
in the batch decides. Prints the smallest distance of each reply (logits of the best two words, over all
positions) and how far the logits of an image move between a batch of its own and one of six, for the small
preset's describer.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from panotriton.models.qwen import QwenVL
from panotriton.pipeline.contract import DESCRIPTION_TOKENS

ROOT = Path(__file__).parent.parent.parent
PANORAMAS = ROOT / "tests" / "data" / "panoramas"
SIDES = range(64, 513, 32)  # px
TOGETHER = 6


def crops(draw: np.random.Generator, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Of real pictures, a third of them blurred."""

    def crop() -> np.ndarray:
        picture = pictures[draw.integers(len(pictures))]
        height, width = draw.choice(SIDES, 2)
        y, x = (
            int(draw.integers(most)) for most in np.subtract(picture.shape[:2], (height, width))
        )
        part = picture[y : y + height, x : x + width]
        blurred = cv2.GaussianBlur(part, (0, 0), draw.uniform(0.5, 4))
        return np.ascontiguousarray(blurred if draw.random() < 1 / 3 else part)

    return [crop() for _ in range(TOGETHER)]


@torch.inference_mode()
def scores(
    qwen: QwenVL, images: list[np.ndarray], prompt: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, tokens, words) and the tokens (N, tokens) of greedy replies."""
    inputs = qwen.inputs(images, prompt)
    made = qwen.model.generate(
        **inputs,
        max_new_tokens=DESCRIPTION_TOKENS,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return torch.stack(made.scores, 1), made.sequences[:, inputs["input_ids"].shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    arguments = parser.parse_args()
    models = ROOT / "repository"
    settings = json.loads((models / "qwen" / "1" / "qwen.json").read_text())
    qwen = QwenVL(models / "qwen" / "1" / settings["weights"], max_pixels=settings["max_pixels"])
    prompt = (models / "qwen_describer" / "1" / "prompt.txt").read_text().strip()
    pictures = [cv2.imread(str(path)) for path in sorted(PANORAMAS.glob("*.jpg"))]
    draw = np.random.default_rng(1)
    margins: list[float] = []
    moved: list[float] = []
    flipped = 0
    until = time.monotonic() + arguments.seconds
    while time.monotonic() < until:
        images = crops(draw, pictures)
        together, words = scores(qwen, images, prompt)
        best = together.topk(2, -1).values
        ended = (words == qwen.processor.tokenizer.eos_token_id).int().cumsum(1) > 1
        apart = (best[..., 0] - best[..., 1]).masked_fill(ended, torch.inf)
        margins += apart.min(1).values.tolist()
        alone, own = scores(qwen, images[:1], prompt)
        length = min(alone.shape[1], together.shape[1])
        if (own[0, :length] != words[0, :length]).any():
            flipped += 1
            continue
        finite = alone[0, :length].isfinite() & together[0, :length].isfinite()
        moved.append(float((alone[0, :length] - together[0, :length])[finite].abs().max()))
    lowest = ", ".join(f"{margin:.1e}" for margin in sorted(margins)[:5])
    print(f"{len(margins)} replies; smallest distances {lowest}; median {np.median(margins):.2g}")
    print(f"{len(moved) + flipped} asked alone too: {flipped} with other words; logits moved by up to "
          f"{max(moved):.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
