"""preprocess: two panoramas and a seed, or cameras → the group's 16 pair images."""

import cv2
import numpy as np

from panotriton.errors import InvalidInput
from panotriton.models.panoramas import read_cameras
from panotriton.models.requests import read_options, required, respond
from panotriton.pipeline.group import crop_pairs, make_spheres


class TritonPythonModel:
    def initialize(self, args):
        cv2.setNumThreads(1)  # crops bring their own threads, one per core

    def execute(self, requests):
        return respond(requests, self._preprocess)

    @staticmethod
    def _preprocess(request):
        panoramas = [required(request, f"PANORAMA_{number}") for number in (1, 2)]
        cameras = read_cameras(request)
        spheres = make_spheres(panoramas, read_options(request))
        images = [sphere.image for sphere in spheres]
        wanted = request.requested_output_names()
        return {
            "SPHERE_1": images[0],
            "SPHERE_2": images[1],
            **({"SPHERES": _both(images)} if "SPHERES" in wanted else {}),
            "PAIRS": crop_pairs(spheres, cameras),
            "CAMERAS": cameras,
        }


def _both(images):
    """(2, H, W, 3)"""
    one, two = (f"{image.shape[1]}×{image.shape[0]}" for image in images)
    if one != two:
        raise InvalidInput(
            f"SPHERES would hold {one} and {two} px; expected one size: ask for SPHERE_1 and SPHERE_2"
        )
    return np.stack(images)
