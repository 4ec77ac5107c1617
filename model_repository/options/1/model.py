"""options: a group's options, checked and completed before any work is done."""

import numpy as np

from panotriton import serving
from panotriton.group import check_crop_size, check_interpolations, check_threshold
from panotriton.osediff import check_options


class TritonPythonModel:
    def execute(self, requests):
        return serving.respond(requests, self._complete)

    @staticmethod
    def _complete(request):
        crop_size = serving.number(request, "CROP_SIZE", 512)
        check_crop_size(crop_size)
        upscale = serving.number(request, "UPSCALE", 2)
        align = serving.text(request, "ALIGN", "adain")
        check_options(upscale, align)
        threshold = serving.number(request, "THRESHOLD", 0.7)
        check_threshold(threshold)
        interpolations = serving.number(request, "NUM_INTERPOLATIONS", 9)
        check_interpolations(interpolations)
        return {
            "CROP_SIZE": np.array([crop_size], np.int32),
            "UPSCALE": np.array([upscale], np.int32),
            "ALIGN": serving.texts([align]),
            "PROMPT": serving.texts([serving.text(request, "PROMPT", "")]),
            "THRESHOLD": np.array([threshold], np.float32),
            "NUM_INTERPOLATIONS": np.array([interpolations], np.int32),
        }
