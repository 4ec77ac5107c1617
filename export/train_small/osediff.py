"""Train the small OSEDiff: the real classes, a few hundred thousand weights, x2, on a CPU.

    python -m panotriton_export.train_small.osediff --images DIR ... --output export/small/osediff

It goes in the order of the original: first a base (VAE, UNet) that works by itself, then, the base
frozen, three UNet adapters, the UNet's conv_in and one VAE-encoder adapter for harder images. What
is learnt first is kept in `base/`, a diffusers folder; what is learnt next in
`adapters.safetensors` and `adapters.json`, which `presets.write_small_checkpoint` turns into an
osediff.pkl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from panotriton_export.train_small.super_resolution.training import Run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, help="folders searched for data.SOURCES"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--state", type=Path, help="where to stop and go on (default: OUTPUT.state.pt)"
    )
    parser.add_argument("--steps", type=int, default=89200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--pixels", type=int, default=36864, help="of the crops of one step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1, help="another number, other rounding")
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()
    args.state = args.state or args.output.with_suffix(".state.pt")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    Run(args).run()


if __name__ == "__main__":
    main()
