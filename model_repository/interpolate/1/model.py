"""interpolate: kept intervals → crops from cameras between the left and the right one."""

import cv2

from panotriton.models.requests import read_options, required, respond
from panotriton.pipeline.group import check_cameras, interpolate_cameras, interpolate_views


class TritonPythonModel:
    def initialize(self, args):
        cv2.setNumThreads(1)  # interpolate_views brings its own threads, one per core

    def execute(self, requests):
        return respond(requests, self._interpolate)

    @staticmethod
    def _interpolate(request):
        cameras = required(request, "CAMERAS")
        check_cameras("CAMERAS", cameras)
        kept = required(request, "KEPT")
        interpolations = read_options(request).interpolations
        between = interpolate_cameras(cameras, kept, interpolations)
        views = interpolate_views(required(request, "SPHERES"), between)
        return {"INTERPOLATED": views, "INTERPOLATED_CAMERAS": between}
