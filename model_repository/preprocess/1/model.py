"""preprocess: two panoramas and a seed, or cameras → the group's 16 pair images."""

import cv2

from panotriton.models.requests import read_cameras, read_options, required, respond
from panotriton.pipeline.group import make_pairs


class TritonPythonModel:
    def initialize(self, args):
        cv2.setNumThreads(1)  # make_pairs brings its own threads, one per core

    def execute(self, requests):
        return respond(requests, self._preprocess)

    @staticmethod
    def _preprocess(request):
        panoramas = [required(request, f"PANORAMA_{number}") for number in (1, 2)]
        cameras = read_cameras(request)
        pairs, spheres = make_pairs(panoramas, cameras, read_options(request).crop_size)
        return {"PAIRS": pairs, "CAMERAS": cameras, "SPHERES": spheres}
