"""qwen_describer: images → two or three sentences each. A failure here never stops a group; a server that has
lost its qwen does, since that is nothing about the images."""

from pathlib import Path

from panotriton.errors import InferenceFailed, ServerBusy
from panotriton.models.requests import ask_qwen, required, respond_async, strings
from panotriton.pipeline.checks import check_images
from panotriton.pipeline.contract import DESCRIPTION_TOKENS, MAX_QWEN_ASPECT, MIN_QWEN_SIDE_PX
from panotriton.pipeline.files import PROMPT


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        self._prompt = (folder / PROMPT).read_text(encoding="utf-8").strip()

    async def execute(self, requests):
        return await respond_async(requests, self._describe)

    async def _describe(self, request):
        images = required(request, "IMAGES")
        check_images("IMAGES", images, MIN_QWEN_SIDE_PX, MAX_QWEN_ASPECT)
        try:
            replies, _ = await ask_qwen(images, self._prompt, max_new_tokens=DESCRIPTION_TOKENS)
            texts, error = [reply.strip() for reply in replies], ""
        except (InferenceFailed, ServerBusy) as failure:
            texts, error = [""] * len(images), str(failure)
        errors = [error] * len(texts)
        return {"DESCRIPTION": strings(texts), "DESCRIPTION_ERROR": strings(errors)}
