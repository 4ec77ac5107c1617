"""preprocess: two panoramas and a seed, or cameras → the group's 16 pair images."""

import cv2

from panotriton import serving
from panotriton.group import make_pairs


class TritonPythonModel:
    def initialize(self, args):
        cv2.setNumThreads(1)  # make_pairs brings its own threads, one a core

    def execute(self, requests):
        return serving.respond(requests, self._preprocess)

    @staticmethod
    def _preprocess(request):
        panoramas = [serving.required(request, f"PANORAMA_{number}") for number in (1, 2)]
        cameras = serving.cameras(request)
        pairs, spheres = make_pairs(panoramas, cameras, serving.number(request, "CROP_SIZE", 512))
        return {"PAIRS": pairs, "CAMERAS": cameras, "SPHERES": spheres}
