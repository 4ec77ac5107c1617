"""interpolate: kept intervals → crops from cameras between the left and the right one."""

import cv2

from panotriton.errors import InvalidInput
from panotriton.models.requests import optional, read_options, required, respond
from panotriton.pipeline.group import (
    check_cameras,
    crop_between,
    interpolate_cameras,
    interpolate_views,
    make_spheres,
)

_SPHERES = ("SPHERE_1", "SPHERE_2")


class TritonPythonModel:
    def initialize(self, args):
        cv2.setNumThreads(1)  # crops bring their own threads, one per core

    def execute(self, requests):
        return respond(requests, self._interpolate)

    @staticmethod
    def _interpolate(request):
        cameras = required(request, "CAMERAS")
        check_cameras("CAMERAS", cameras)
        kept = required(request, "KEPT")
        options = read_options(request)
        between = interpolate_cameras(cameras, kept, options.interpolations)
        return {
            "INTERPOLATED": _views(request, between, options),
            "INTERPOLATED_CAMERAS": between,
        }


def _views(request, between, options):
    both = optional(request, "SPHERES")
    apart = [image for name in _SPHERES if (image := optional(request, name)) is not None]
    if both is not None and not apart:
        return interpolate_views(both, between)
    if both is None and len(apart) == len(_SPHERES):
        return crop_between(make_spheres(apart, options, _SPHERES), between)
    raise InvalidInput(
        "SPHERE_1 and SPHERE_2, or SPHERES: send both of the first, or the last alone"
    )
