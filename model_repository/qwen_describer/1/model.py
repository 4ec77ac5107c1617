"""qwen_describer: images → two or three sentences each. A failure here never stops a group."""

from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from panotriton import serving
from panotriton.errors import InferenceFailed

_MAX_NEW_TOKENS = 256


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        self._prompt = (folder / "prompt.txt").read_text(encoding="utf-8").strip()

    async def execute(self, requests):
        return await serving.respond_async(requests, self._describe)

    async def _describe(self, request):
        images = pb_utils.get_input_tensor_by_name(request, "IMAGES")
        inputs = {
            "IMAGES": images,
            "SYSTEM_PROMPT": serving.texts([self._prompt]),
            "MAX_NEW_TOKENS": np.array([_MAX_NEW_TOKENS], np.int32),
        }
        try:
            replies = (await serving.call("qwen", inputs, ["TEXT"]))["TEXT"]
            texts, error = [reply.decode().strip() for reply in replies], ""
        except InferenceFailed as failure:
            texts, error = [""] * images.shape()[0], str(failure)
        errors = [error] * len(texts)
        return {"DESCRIPTION": serving.texts(texts), "DESCRIPTION_ERROR": serving.texts(errors)}
