"""qwen: images and a system prompt → replies, or numbers read directly, of a Qwen-VL model.

The images of all requests of one execute call that ask the same are worked on together.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from panotriton import serving
from panotriton.errors import InvalidInput
from panotriton.images import check_images
from panotriton.qwen import MIN_SIDE_PX, READINGS, QwenVL

_MAX_NEW_TOKENS = 2048
_QUESTION = ("SYSTEM_PROMPT", "READING", "STOP_AFTER", "MAX_NEW_TOKENS")


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / "qwen.json").read_text())
        limits = json.loads(args["model_config"])["parameters"]
        on_gpu = args["model_instance_kind"] == "GPU"
        self._qwen = QwenVL(
            folder / settings["weights"],  # an absolute path stands for itself
            dtype=settings["dtype"],
            device=f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu",
            max_batch=int(limits["max_batch_images"]["string_value"]),
            max_pixels=settings["max_pixels"],
        )

    def execute(self, requests):
        asked = [serving.attempt(_read, request) for request in requests]
        together = defaultdict(list)  # question → indices of requests
        for index, request in enumerate(asked):
            if not isinstance(request, Exception):
                together[request[1]].append(index)
        results = list(asked)
        for question, indices in together.items():
            images = [image for index in indices for image in asked[index][0]]
            outcome = serving.attempt(self._answer, images, *question)
            for index in indices:
                count = len(asked[index][0])
                results[index] = outcome if isinstance(outcome, Exception) else outcome[:count]
                outcome = outcome if isinstance(outcome, Exception) else outcome[count:]
        return serving.answers([_tensors(result) for result in results])

    def _answer(self, images, prompt, reading, stop_after, max_new_tokens):
        """(text, value) an image: the one that was asked for, and nothing or NaN for the other."""
        if reading == "number":
            return [("", value) for value in self._qwen.read_number(images, prompt)]
        if reading == "levels":
            return [("", value) for value in self._qwen.read_level(images, prompt)]
        replies = self._qwen.reply(images, prompt, max_new_tokens, stop_after)
        return [(reply, np.nan) for reply in replies]


def _read(request):
    """A request's images, and its question as values that can be compared."""
    images = serving.required(request, "IMAGE")  # (N, H, W, 3)
    check_images("IMAGE", images, min_side_px=MIN_SIDE_PX)
    question = [set(serving.required(request, name).flat) for name in _QUESTION]
    for name, values in zip(_QUESTION, question, strict=True):
        if len(values) != 1:
            raise InvalidInput(
                f"{name} differs between the images of one request; send one a request"
            )
    prompt, reading, stop_after, limit = (value for (value,) in question)
    if reading.decode() not in READINGS:
        raise InvalidInput(f"READING is {reading!r}; expected one of {', '.join(READINGS)}")
    if not 1 <= limit <= _MAX_NEW_TOKENS:
        raise InvalidInput(f"MAX_NEW_TOKENS is {limit}; expected 1 to {_MAX_NEW_TOKENS}")
    return list(images), (
        prompt.decode(),
        reading.decode(),
        stop_after.decode(),
        int(limit),
    )


def _tensors(result):
    if isinstance(result, Exception):
        return result
    texts, values = zip(*result, strict=True)
    values = np.array(values, np.float32)
    return {"TEXT": serving.texts(texts)[:, None], "VALUE": values[:, None]}  # (N, 1) each
