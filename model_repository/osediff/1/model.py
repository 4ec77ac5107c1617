"""Images → super-resolved images, through the exported networks of this repository."""

import cv2
import triton_python_backend_utils as pb_utils

from panotriton.models.requests import calls_until, read_options, required, respond_async, strings
from panotriton.models.super_resolution import SuperResolver
from panotriton.pipeline.checks import check_images
from panotriton.pipeline.contract import MIN_SR_SIDE_PX


class TritonPythonModel:
    def initialize(self, args):
        cv2.setNumThreads(1)
        self._name = args["model_name"]
        self._resolver = SuperResolver.of_model(args)
        if self._resolver.lacks_tagger and args["model_instance_name"].endswith("_0"):  # said once
            pb_utils.Logger.log_info(
                f"{self._name}: no tagger was exported, so prompts are the callers' alone; "
                f"`panotriton export {self._name} --tagger` adds one"
            )

    async def execute(self, requests):
        return await respond_async(requests, self._super_resolve)

    async def _super_resolve(self, request):
        images = required(request, "IMAGES")
        check_images("IMAGES", images, min_side_px=MIN_SR_SIDE_PX)
        call, warnings = calls_until(request.is_cancelled), []
        sharp = await self._resolver.run(images, call, read_options(request), warnings)
        for warning in warnings:
            pb_utils.Logger.log_warn(f"{self._name}: {warning}")
        return {"IMAGES_SR": sharp, "WARNING": strings(warnings or [""])}
