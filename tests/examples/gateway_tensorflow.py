"""Super-resolve a TensorFlow tensor over the gateway: JSON with base64 there and back.

python gateway_tensorflow.py http://127.0.0.1:5001 picture.png sharp.png
"""

import base64
import json
import sys
import urllib.request

import tensorflow as tf


def super_resolve(url: str, images: tf.Tensor) -> tf.Tensor:
    """(H, W, 3) or (N, H, W, 3), uint8 or float32 in 0…1, RGB → the same, twice as large."""
    body = {
        "tensor": base64.b64encode(images.numpy().tobytes()).decode(),
        "shape": images.shape.as_list(),
        "dtype": images.dtype.name,
        "layout": "NHWC" if images.shape.rank == 4 else "HWC",
    }
    request = urllib.request.Request(
        f"{url}/super_resolution_tensor",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        got = json.load(reply)
    flat = tf.io.decode_raw(base64.b64decode(got["tensor"]), got["dtype"])
    return tf.reshape(flat, got["shape"])


if __name__ == "__main__":
    url, source, target = sys.argv[1:]
    picture = tf.io.decode_image(tf.io.read_file(source), channels=3)
    tf.io.write_file(target, tf.io.encode_png(super_resolve(url, picture)))
