"""Super-resolve a PyTorch tensor over the gateway: safetensors there, safetensors back.

python gateway_torch.py http://127.0.0.1:5001 picture.safetensors sharp.safetensors
"""

import sys
import urllib.request

import torch
from safetensors.torch import load, load_file, save, save_file


def super_resolve(url: str, images: torch.Tensor) -> torch.Tensor:
    """(3, H, W) or (N, 3, H, W), uint8 or float32 in 0…1, RGB → the same, twice as large."""
    layout = "NCHW" if images.ndim == 4 else "CHW"
    request = urllib.request.Request(
        f"{url}/super_resolution_tensor?layout={layout}",
        save({"tensor": images.contiguous().cpu()}),
        {"Content-Type": "application/octet-stream"},
    )
    with urllib.request.urlopen(request) as reply:
        return load(reply.read())["tensor"].to(images.device)


if __name__ == "__main__":
    url, source, target = sys.argv[1:]
    save_file({"tensor": super_resolve(url, load_file(source)["tensor"])}, target)
