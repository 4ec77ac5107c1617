"""The scorer: a Qwen2.5-VL of 3B's shape with random weights, in bfloat16 on the GPU.

python tests/gpu/reading.py [--decode static]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import record  # first: it makes the measurements importable
import torch
from record import script

import qwen as bench  # isort: skip
from panotriton.models.qwen import QwenVL

TOKENS = 64


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--decode", choices=["dynamic", "static"], default="dynamic")


def measure(
    model: QwenVL, count: int, quick: bool, found: record.Record, *, expected: bool
) -> None:
    prompt, images = bench.PROMPT.read_text().strip(), bench.pairs(count)
    images = [each[:112, :224] for each in images] if quick else images
    runs = 1 if quick else 3

    def waited(work: Any) -> dict[str, float]:
        def once() -> None:
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return record.timed(once, runs=runs, budget_s=20)

    if expected:
        found.attempt(
            f"expected, {count} pairs", lambda: waited(lambda: model.read_number(images, prompt))
        )
    few, many = (4, 8) if quick else (8, 8 + TOKENS)
    spent = {}
    for limit in (few, many):
        spent[limit] = waited(lambda limit=limit: model.reply(images, prompt, limit))["ms"]
    found[f"decode, {count} pairs, ms a token"] = round(
        (spent[many] - spent[few]) / (many - few), 2
    )


def main() -> None:
    """Write the weights, load and ask."""
    chosen = record.options(__doc__, arguments)
    found = record.Record(chosen.json)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as work:
        folder = bench.SMALL
        if not chosen.quick:
            folder = Path(work)
            found["parameters"] = bench.write_real(folder, None, device.partition(":")[0])
        began = time.perf_counter()
        sizes = {"max_batch": 16, "max_pixels": bench.REAL_PIXELS, "decode": chosen.decode}
        model = QwenVL(folder, device=device, **sizes)
        found["load_s"] = round(time.perf_counter() - began, 1)
        for count in (1, 2) if chosen.quick else (1, 16):
            measure(model, count, chosen.quick, found, expected=chosen.decode == "dynamic")
    if torch.cuda.is_available():
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)


if __name__ == "__main__":
    script.run(main)
