"""The request of every public model, with plain tritonclient and nothing else of this project.

python tests/examples/plain_requests.py [grpc|http] HOST:PORT PANORAMA PANORAMA
"""

import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import np_to_triton_dtype


def ask(client, wire, model, inputs, outputs):
    """Named arrays in, named arrays out."""
    tensors = []
    for name, value in inputs.items():
        tensors.append(wire.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype)))
        tensors[-1].set_data_from_numpy(value)
    wanted = [wire.InferRequestedOutput(name) for name in outputs]
    result = client.infer(model, tensors, outputs=wanted)
    return {name: result.as_numpy(name) for name in outputs}


def text(value):
    """A string tensor (1,); strings travel as bytes."""
    return np.array([value], dtype=np.object_)


def requests(one, two):
    """model → its inputs and outputs. What is left out has a default, written in the config.pbtxt."""
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in (one, two)]
    images = pixels[0][None, :64, :128]  # (N, H, W, 3) uint8
    camera = np.array([[30.0, -10.0, 0.0, 90.0, 0.4]])  # (N, 5): yaw, pitch, roll, vfov, xi
    group = {
        "SEED": np.array([7], np.int64),
        "CROP_SIZE": np.array([64], np.int32),
        "NUM_INTERPOLATIONS": np.array([1], np.int32),
        "THRESHOLD": np.array([0.7], np.float32),
    }
    raw = {"PANORAMA_1": pixels[0], "PANORAMA_2": pixels[1]}
    encoded = {"ENCODED_1": text(one.read_bytes()), "ENCODED_2": text(two.read_bytes())}
    made = ("CAMERAS", "PAIRS_SR", "SCORE", "KEPT", "DESCRIPTION", "INTERPOLATED_SR")
    crop_size = {"CROP_SIZE": group["CROP_SIZE"], "SEED": group["SEED"]}
    return {
        "decode": ({"ENCODED": text(one.read_bytes())}, ("IMAGE",)),
        "crop": ({"PANORAMA": pixels[0], "CAMERAS": camera}, ("CROPS",)),
        "preprocess": (raw | crop_size, ("PAIRS", "CAMERAS", "SPHERES")),
        "osediff": (
            {"IMAGES": images, "UPSCALE": np.array([2], np.int32), "ALIGN": text(b"wavelet")},
            ("IMAGES_SR",),
        ),
        "qwen_scorer": ({"IMAGES": images}, ("SCORE", "SUB_SCORES", "RAW_OUTPUT")),
        "qwen_describer": ({"IMAGES": images}, ("DESCRIPTION", "DESCRIPTION_ERROR")),
        "panorama": (raw | group, made),
        "panorama_encoded": (encoded | group, made),
    }


def main(protocol, url, one, two):
    """Send each and print what comes back."""
    wire = tritonclient.grpc if protocol == "grpc" else tritonclient.http
    options = {} if protocol == "grpc" else {"network_timeout": 600.0}
    client = wire.InferenceServerClient(url, **options)
    for model, (inputs, outputs) in requests(Path(one), Path(two)).items():
        got = ask(client, wire, model, inputs, outputs)
        shapes = ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in got.items())
        print(f"{model}: {shapes}")
    client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
