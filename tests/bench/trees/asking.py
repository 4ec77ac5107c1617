"""A client that answers each line of JSON with the seconds that it took: asking.py ADDRESS.

{"panoramas": [A, B], …}: a group, the rest as options; {"side": [HEIGHT, WIDTH], "upscale": N}: an image. Of
`against`, which runs it with the package of another tree: it imports no more of that than it has to.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from panotriton import Client


def ask(client: Client, wanted: dict[str, Any]) -> None:
    if "panoramas" in wanted:
        client.process(*wanted.pop("panoramas"), **wanted)
    else:
        image = np.random.default_rng(0).integers(0, 256, (*wanted.pop("side"), 3), np.uint8)
        client.upscale(image, **wanted)


if __name__ == "__main__":
    with Client(sys.argv[1], timeout_s=600) as opened:
        for line in sys.stdin:
            began = time.perf_counter()
            ask(opened, json.loads(line))
            print(time.perf_counter() - began, flush=True)
