"""Pixels by shared memory, there and back; the server runs on this machine.

python tests/examples/shared_memory.py HOST:PORT PANORAMA PANORAMA
"""

import sys

import numpy as np
from PIL import Image

from panotriton import Client


def main(url, one, two):
    """The same calls, with `via`."""
    images = [np.asarray(Image.open(path).convert("RGB"))[:64, :128] for path in (one, two)]
    with Client(url) as client, client.shared_memory(64 << 20) as memory:
        for sharp in client.upscale(images, via=memory):
            print(sharp.image.size, f"{sharp.timings.total_ms:.0f} ms")
        score = client.score(sharp.image, via=memory)
        print(f"score {score.final:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
