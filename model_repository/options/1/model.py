"""options: a group's options, checked and completed before any work is done."""

import numpy as np

from panotriton.models.osediff import check_options
from panotriton.models.requests import number, respond, string, strings
from panotriton.pipeline.group import check_crop_size, check_interpolations, check_threshold


class TritonPythonModel:
    def execute(self, requests):
        return respond(requests, self._complete)

    @staticmethod
    def _complete(request):
        crop_size = number(request, "CROP_SIZE", 512)
        check_crop_size(crop_size)
        upscale = number(request, "UPSCALE", 2)
        align = string(request, "ALIGN", "adain")
        check_options(upscale, align)
        threshold = number(request, "THRESHOLD", 0.7)
        check_threshold(threshold)
        interpolations = number(request, "NUM_INTERPOLATIONS", 9)
        check_interpolations(interpolations)
        return {
            "CROP_SIZE": np.array([crop_size], np.int32),
            "UPSCALE": np.array([upscale], np.int32),
            "ALIGN": strings([align]),
            "PROMPT": strings([string(request, "PROMPT", "")]),
            "THRESHOLD": np.array([threshold], np.float32),
            "NUM_INTERPOLATIONS": np.array([interpolations], np.int32),
        }
