"""Super-resolve a NumPy array over the gateway: .npy there, .npy back. Needs numpy and nothing else.

python gateway_numpy.py http://127.0.0.1:5001 picture.npy sharp.npy
"""

import io
import sys
import urllib.request

import numpy as np


def super_resolve(url: str, images: np.ndarray) -> np.ndarray:
    """(H, W, 3) or (N, H, W, 3), uint8 or float32 in 0…1, RGB → the same, twice as large."""
    body = io.BytesIO()
    np.save(body, np.ascontiguousarray(images))
    layout = "NHWC" if images.ndim == 4 else "HWC"
    request = urllib.request.Request(
        f"{url}/super_resolution_tensor?layout={layout}",
        body.getvalue(),
        {"Content-Type": "application/octet-stream"},
    )
    with urllib.request.urlopen(request) as reply:
        return np.load(io.BytesIO(reply.read()))


if __name__ == "__main__":
    url, source, target = sys.argv[1:]
    np.save(target, super_resolve(url, np.load(source)))
