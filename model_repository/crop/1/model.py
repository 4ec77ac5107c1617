"""crop: a panorama and cameras → one view per camera."""

import os

import cv2
import numpy as np

from panotriton.errors import InvalidInput
from panotriton.models.panoramas import read_panorama
from panotriton.models.requests import read_options, required, respond
from panotriton.pipeline.camera import Camera, Sphere
from panotriton.pipeline.contract import MAX_CAMERAS


class TritonPythonModel:
    def initialize(self, args):
        cv2.setNumThreads(1)  # crops bring their own threads, one per core

    def execute(self, requests):
        return respond(requests, self._crop)

    @staticmethod
    def _crop(request):
        cameras = _cameras(required(request, "CAMERAS"))
        options = read_options(request)
        size = options.crop_size
        views = np.empty((len(cameras), size, size, 3), np.uint8)
        sphere = Sphere(read_panorama(request), size, options.sphere_size)
        sphere.crops(cameras, views, threads=os.cpu_count() or 1)
        return {"CROPS": views}


def _cameras(rows):
    if len(rows) > MAX_CAMERAS:
        raise InvalidInput(f"CAMERAS holds {len(rows)}; expected at most {MAX_CAMERAS} a request")
    cameras = []
    for index, row in enumerate(rows):
        try:
            cameras.append(Camera.from_array(row))
        except ValueError as error:
            raise InvalidInput(f"CAMERAS[{index}]: {error}") from error
    return cameras
