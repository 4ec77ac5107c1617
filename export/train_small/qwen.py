"""Trains a very small Qwen2.5-VL that judges pairs and describes views, from nothing, on a CPU.

    python -m panotriton_export.train_small.qwen --panoramas tests/data/panoramas \
        --output export/small/qwen --seed 7

The result is an ordinary Hugging Face folder of the real classes. Nothing is downloaded. The same
seed and step counts give the same training data and order; the last bits of the weights depend on
the processor and the version of torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from panotriton_export.train_small.vision_language.processor import build_processor
from panotriton_export.train_small.vision_language.scenes import cut, load_panoramas
from panotriton_export.train_small.vision_language.training import Trainer

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--panoramas", type=Path, default=Path("tests/data/panoramas"))
    parser.add_argument("--output", type=Path, default=Path("export/small/qwen"))
    parser.add_argument("--vision-steps", type=int, default=2000)
    parser.add_argument("--text-steps", type=int, default=1100)
    parser.add_argument("--all-steps", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--groups", type=int, default=32, help="camera draws for each panorama")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    trainer = Trainer(build_processor(), options.seed)
    print("cutting the panoramas", flush=True)
    scenes = cut(load_panoramas(options.panoramas), range(options.groups))
    trainer.start(scenes)
    trainer.train_vision(scenes, options.vision_steps)
    trainer.train_text(scenes, options.text_steps)
    trainer.train_all(scenes, options.all_steps)
    trainer.save(options.output)


if __name__ == "__main__":
    main()
