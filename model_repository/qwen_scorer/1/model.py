"""qwen_scorer: pair images → final score, five sub-scores and the raw reply."""

from pathlib import Path

import numpy as np

from panotriton import serving
from panotriton.images import check_images
from panotriton.quality import parse_reply

_MAX_NEW_TOKENS = 512


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        self._prompt = (folder / "prompt.txt").read_text(encoding="utf-8").strip()

    async def execute(self, requests):
        return await serving.respond_async(requests, self._score)

    async def _score(self, request):
        images = serving.required(request, "IMAGES")
        check_images("IMAGES", images, min_side_px=28)
        replies = await serving.ask_qwen(images, self._prompt, _MAX_NEW_TOKENS)
        scores = [parse_reply(reply) for reply in replies]
        return {
            "SCORE": np.array([score.final_score for score in scores], np.float32),
            "SUB_SCORES": np.array([s.sub_scores() for s in scores], np.float32).reshape(-1, 5),
            "RAW_OUTPUT": serving.texts(replies),
        }
