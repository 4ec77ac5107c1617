"""osediff: images → super-resolved images, through the exported networks of this repository."""

from pathlib import Path

import cv2
import triton_python_backend_utils as pb_utils

from panotriton.models.requests import calls_until, read_options, required, respond_async, strings
from panotriton.models.super_resolution import Limits, SuperResolver
from panotriton.models.tags import Tags
from panotriton.pipeline.contract import MIN_SR_SIDE_PX
from panotriton.pipeline.images import check_images


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
        return await respond_async(requests, self._super_resolve)

    async def _super_resolve(self, request):
        images = required(request, "IMAGES")
        check_images("IMAGES", images, min_side_px=MIN_SR_SIDE_PX)
        options = read_options(request)
        warnings = []
        sharp = await self._resolver.run(
            images,
            calls_until(request.is_cancelled),
            upscale=options.upscale,
            method=options.align,
            prompt=options.prompt,
            warnings=warnings,
        )
        for warning in warnings:
            pb_utils.Logger.log_warn(f"osediff: {warning}")
        return {"IMAGES_SR": sharp, "WARNING": strings(warnings or [""])}
