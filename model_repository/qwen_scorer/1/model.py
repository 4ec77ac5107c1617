"""qwen_scorer: pair images → final score, five sub-scores and the raw reply."""

from pathlib import Path

import numpy as np

from panotriton.errors import InvalidInput, quoted
from panotriton.models.requests import ask_qwen, required, respond_async, string, strings
from panotriton.pipeline.checks import check_images
from panotriton.pipeline.contract import MAX_QWEN_ASPECT, MIN_QWEN_SIDE_PX, SCORE_TOKENS
from panotriton.pipeline.files import PROMPT
from panotriton.pipeline.quality import MODES, parse_reply


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        self._prompt = (folder / PROMPT).read_text(encoding="utf-8").strip()

    async def execute(self, requests):
        return await respond_async(requests, self._score)

    async def _score(self, request):
        images = required(request, "IMAGES")
        check_images("IMAGES", images, MIN_QWEN_SIDE_PX, MAX_QWEN_ASPECT)
        mode = string(request, "MODE", "generate")
        if mode not in MODES:
            raise InvalidInput(f"MODE is {quoted(mode)}; expected one of {', '.join(MODES)}")
        replies, values = await ask_qwen(
            images,
            self._prompt,
            reading=MODES[mode],
            stop_after="final score",
            max_new_tokens=SCORE_TOKENS,
        )
        scores = [parse_reply(reply) for reply in replies]
        final = [score.final_score for score in scores] if mode == "generate" else values
        return {
            "SCORE": np.array(final, np.float32),
            "SUB_SCORES": np.array([s.sub_scores() for s in scores], np.float32).reshape(-1, 5),
            "RAW_OUTPUT": strings(replies),
        }
