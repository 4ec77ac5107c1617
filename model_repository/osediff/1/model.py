"""osediff: images → super-resolved images, through the exported networks of this repository."""

from pathlib import Path

import cv2
import triton_python_backend_utils as pb_utils

from panotriton import serving
from panotriton.images import check_images
from panotriton.osediff import check_options
from panotriton.super_resolution import Limits, SuperResolver
from panotriton.tags import Tags


class TritonPythonModel:
    def initialize(self, args):
        cv2.setNumThreads(1)
        folder = Path(args["model_repository"]) / args["model_version"]
        tags = Tags.read(folder)
        if tags is None and args["model_instance_name"].endswith("_0"):  # said once
            pb_utils.Logger.log_info(
                "osediff: no tagger was exported, so prompts are the callers' alone; "
                "`panotriton export osediff --tagger` adds one"
            )
        self._resolver = SuperResolver(folder, Limits.from_config(args["model_config"]), tags)

    async def execute(self, requests):
        return await serving.respond_async(requests, self._super_resolve)

    async def _super_resolve(self, request):
        images = serving.required(request, "IMAGES")
        check_images("IMAGES", images, min_side_px=8)
        upscale = serving.number(request, "UPSCALE", 2)
        method = serving.text(request, "ALIGN", "adain")
        check_options(upscale, method)
        sharp = await self._resolver.run(
            images,
            serving.calls_until(request.is_cancelled),
            upscale=upscale,
            method=method,
            prompt=serving.text(request, "PROMPT", ""),
        )
        return {"IMAGES_SR": sharp}
