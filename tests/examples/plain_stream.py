"""The events of `panorama_stream` with plain tritonclient: one request in, a stream of responses out.

python tests/examples/plain_stream.py HOST:PORT PANORAMA PANORAMA
"""

import json
import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton


def main(url, one, two):
    """Print every event; images and cameras come as tensors beside it."""
    responses = queue.SimpleQueue()
    client = triton.InferenceServerClient(url)
    client.start_stream(lambda result, error: responses.put((result, error)))
    inputs = []
    values = {
        "ENCODED_1": np.array([Path(one).read_bytes()], np.object_),
        "ENCODED_2": np.array([Path(two).read_bytes()], np.object_),
        "SEED": np.array([7], np.int64),
        "CROP_SIZE": np.array([64], np.int32),
    }
    kinds = {"SEED": "INT64", "CROP_SIZE": "INT32"}
    for name, value in values.items():
        inputs.append(triton.InferInput(name, [1], kinds.get(name, "BYTES")))
        inputs[-1].set_data_from_numpy(value)
    client.async_stream_infer("panorama_stream", inputs)
    kind = ""
    while kind not in ("done", "refused", "failed"):
        result, error = responses.get()
        if error is not None:
            raise error
        event = json.loads(result.as_numpy("EVENT").item())
        kind = event["event"]
        image = result.as_numpy("IMAGES")
        print(f"{event['done']}/{event['total']} {kind}", "" if image is None else image.shape)
    client.stop_stream()
    client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
