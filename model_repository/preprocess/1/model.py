"""preprocess: two panoramas and a seed, or cameras → the group's 16 pair images."""

import cv2

from panotriton import serving
from panotriton.camera import sample_cameras
from panotriton.errors import InvalidInput
from panotriton.group import check_cameras, make_pairs


class TritonPythonModel:
    def initialize(self, args):
        cv2.setNumThreads(1)  # make_pairs brings its own threads, one a core

    def execute(self, requests):
        return serving.respond(requests, self._preprocess)

    @staticmethod
    def _preprocess(request):
        panoramas = [serving.required(request, f"PANORAMA_{number}") for number in (1, 2)]
        cameras = _cameras(request)
        pairs, spheres = make_pairs(panoramas, cameras, serving.number(request, "CROP_SIZE", 512))
        return {"PAIRS": pairs, "CAMERAS": cameras, "SPHERES": spheres}


def _cameras(request):
    """The cameras (2, 8, 2, 5) that the caller gave or, from a seed, drew."""
    given = serving.optional(request, "GIVEN_CAMERAS")
    seed = serving.optional(request, "SEED")
    if (given is None) == (seed is None):
        both = "neither is" if given is None else "both are"
        raise InvalidInput(f"SEED or GIVEN_CAMERAS: {both} given; send exactly one of them")
    if given is not None:
        check_cameras("GIVEN_CAMERAS", given)
        return given
    if seed.item() < 0:
        raise InvalidInput(f"SEED is {seed.item()}; expected 0 or more")
    return sample_cameras(seed.item())
