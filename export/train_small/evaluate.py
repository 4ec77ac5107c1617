"""Judges a trained small Qwen on panoramas that it has never seen, through the real processor."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from panotriton.groups.agreement import compare, spearman
from panotriton.models.qwen import QwenVL
from panotriton.pipeline.quality import parse_reply

from .vision_language.degrade import FAULTS
from .vision_language.processor import prompts
from .vision_language.replies import describe, look_at
from .vision_language.scenes import HELD_OUT, cut, load_panoramas, make_sample

__all__ = ["Judge", "main"]

_BATCH = 16


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--panoramas", type=Path, default=Path("tests/data/panoramas"))
    parser.add_argument("--model", type=Path, default=Path("export/small/qwen"))
    parser.add_argument("--pairs", type=int, default=200, help="pairs for each fault")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--names", nargs="*", default=list(HELD_OUT))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    judge = Judge(options.model)
    figures = evaluate(judge, options.panoramas, options.names, options.pairs)
    print(json.dumps(figures, indent=1))


class Judge:
    """The folder, loaded as the server loads it."""

    def __init__(self, folder: Path) -> None:
        self.engine = QwenVL(folder, max_batch=2 * _BATCH)

    def reply(self, images: Sequence[NDArray[np.uint8]], task: str) -> list[str]:
        """Greedy replies to RGB images (H, W, 3) of any sizes, in one left-padded batch."""
        return self.engine.reply(images, prompts()[task], 256)

    def read(self, images: Sequence[NDArray[np.uint8]]) -> dict[str, list[float]]:
        """The scores of the modes that decode nothing."""
        prompt = prompts()["quality"]
        return {
            "expected": self.engine.read_number(images, prompt),
            "levels": self.engine.read_level(images, prompt),
        }


def evaluate(judge: Judge, folder: Path, names: Sequence[str], count: int) -> dict[str, Any]:
    scenes = cut(load_panoramas(folder, names), range(1000, 1006), whole=True)
    rng = np.random.default_rng(1)
    figures: dict[str, Any] = {"held_out": list(names), "pairs_per_fault": count}
    strengths, finals, wanted, parsed = [], [], [], 0
    read: dict[str, list[float]] = {"expected": [], "levels": []}
    for fault in ("none", *FAULTS):
        samples = [make_sample(scenes, rng, fault, varied=False) for _ in range(count)]
        qualities = []
        for start in range(0, count, _BATCH):
            pairs = [served(sample.pair) for sample in samples[start : start + _BATCH]]
            qualities += [parse_reply(reply) for reply in judge.reply(pairs, "quality")]
            for mode, values in judge.read(pairs).items():
                read[mode] += values
        final = np.array([quality.final_score for quality in qualities])
        parsed += sum(
            not np.isnan([*quality.sub_scores(), quality.final_score]).any()
            for quality in qualities
        )
        target = np.array([sample.scores.final for sample in samples])
        strength = np.array([sample.strength for sample in samples])
        figures[fault] = _summary(strength, final, target)
        strengths.append(strength)
        finals.append(final)
        wanted.append(target)
    pooled = [np.concatenate(parts) for parts in (strengths[1:], finals[1:], wanted[1:])]
    figures["pooled"] = _summary(*pooled)
    everything, targets = np.concatenate(finals), np.concatenate(wanted)
    figures["generate_against_target"] = _agreement(targets, everything)
    for mode, values in read.items():
        figures[f"{mode}_against_generate"] = _agreement(everything, np.array(values))
        figures[f"{mode}_against_target"] = _agreement(targets, np.array(values))
    figures["parsed_share"] = parsed / (count * (len(FAULTS) + 1))
    figures["described"] = _descriptions(judge, [scene.right for scene in scenes[:64]])
    figures["batch_equals_single"] = _batched(judge, [served(scene.pair) for scene in scenes[:24]])
    return figures


def served(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bring a pair (512, 1024, 3) to the 1024 × 2048 in which it would arrive."""
    return np.asarray(cv2.resize(image, (2048, 1024), interpolation=cv2.INTER_CUBIC))


def _summary(strength: Any, final: Any, target: Any) -> dict[str, Any]:
    summary = {
        "final_p10_p50_p90": [round(float(p), 2) for p in np.percentile(final, [10, 50, 90])],
        "mean_abs_error": round(float(np.abs(final - target).mean()), 3),
        "share_at_least_0.7": round(float((final >= 0.7).mean()), 3),
        "agrees_with_target_at_0.7": round(float(((final >= 0.7) == (target >= 0.7)).mean()), 3),
        "spearman_with_target": round(spearman(final, target), 3),
    }
    if strength.any():
        summary["spearman_with_strength"] = round(spearman(strength, final), 3)
        summary["spearman_of_targets"] = round(spearman(strength, target), 3)
        summary["final_by_fifth_of_strength"] = [
            round(float(final[(strength >= low) & (strength < low + 0.2)].mean()), 2)
            for low in (0.0, 0.2, 0.4, 0.6, 0.8)
        ]
    return summary


def _agreement(first: Any, second: Any) -> dict[str, Any]:
    """At 0.7; `share`: how many pairs both let pass or both drop."""
    found = compare(first, second, 0.7)
    return {name: round(value, 3) for name, value in asdict(found).items()} | {
        "share": round(found.agreement, 3),
        "mean_abs_difference": round(float(np.nanmean(np.abs(first - second))), 3),
    }


def _descriptions(judge: Judge, views: list[NDArray[np.uint8]]) -> dict[str, Any]:
    """How often each of the six slots is right."""
    said = [
        reply
        for start in range(0, len(views), _BATCH)
        for reply in judge.reply(views[start : start + _BATCH], "describe")
    ]
    truth = [describe(look_at(view)).said for view in views]
    slots = np.array(
        [
            [x == y for x, y in zip(_slots(a), _slots(b), strict=True)]
            for a, b in zip(said, truth, strict=True)
        ]
    )
    return {
        "two_or_three_sentences": float(
            np.mean([r.endswith(".") and r.count(".") in (2, 3) for r in said])
        ),
        "exactly_right": float(np.mean([a == b for a, b in zip(said, truth, strict=True)])),
        "right": dict(zip(_SLOTS, slots.mean(axis=0).round(2).tolist(), strict=True)),
        "different_replies": len(set(said)),
        "example": said[0],
        "example_truth": truth[0],
    }


_SLOTS = ("light", "tone", "contrast", "layout", "detail", "colours")


def _slots(text: str) -> list[str]:
    """The six words or phrases of a description that depend on the picture."""
    found = re.fullmatch(
        r"An? (.*) scene in (\S+) tones with (\S+) contrast\. (.*)\. (.*), and the colours are (.*)\.",
        text,
    )
    return list(found.groups()) if found else [""] * 6


def _batched(judge: Judge, pairs: list[NDArray[np.uint8]]) -> dict[str, Any]:
    """Whole pairs batched with a smaller picture, which makes the batch left-padded."""
    small = cv2.resize(pairs[0], (224, 112))
    images = [*pairs[:_BATCH], small]
    started = time.perf_counter()
    judge.reply(pairs[:_BATCH], "quality")
    spent = time.perf_counter() - started
    together = judge.reply(images, "quality")
    alone = [judge.reply([image], "quality")[0] for image in images]
    return {
        "share": float(np.mean([a == b for a, b in zip(together, alone, strict=True)])),
        "seconds_for_16_pairs": round(spent, 2),
    }


if __name__ == "__main__":
    main()
