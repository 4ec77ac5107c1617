"""qwen_scorer: pair images → final score, five sub-scores and the raw reply."""

from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from panotriton import serving
from panotriton.quality import parse_reply

_MAX_NEW_TOKENS = 512


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        self._prompt = (folder / "prompt.txt").read_text(encoding="utf-8").strip()

    async def execute(self, requests):
        return await serving.respond_async(requests, self._score)

    async def _score(self, request):
        inputs = {
            "IMAGES": pb_utils.get_input_tensor_by_name(request, "IMAGES"),
            "SYSTEM_PROMPT": serving.texts([self._prompt]),
            "MAX_NEW_TOKENS": np.array([_MAX_NEW_TOKENS], np.int32),
        }
        replies = (await serving.call("qwen", inputs, ["TEXT"]))["TEXT"]
        scores = [parse_reply(reply.decode()) for reply in replies]
        return {
            "SCORE": np.array([score.final_score for score in scores], np.float32),
            "SUB_SCORES": np.array([s.sub_scores() for s in scores], np.float32).reshape(-1, 5),
            "RAW_OUTPUT": replies,
        }
