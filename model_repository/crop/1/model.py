"""crop: a panorama and cameras → one view per camera."""

import os

import cv2
import numpy as np

from panotriton.errors import InvalidInput
from panotriton.models.requests import number, optional, required, respond
from panotriton.pipeline.camera import Camera, Sphere
from panotriton.pipeline.group import check_crop_size
from panotriton.pipeline.images import check_panorama, decode_image

_MAX_CAMERAS = 256  # bounds what a request makes the server allocate


class TritonPythonModel:
    def initialize(self, args):
        cv2.setNumThreads(1)  # crops bring their own threads, one per core

    def execute(self, requests):
        return respond(requests, self._crop)

    @staticmethod
    def _crop(request):
        cameras = _cameras(required(request, "CAMERAS"))
        size = number(request, "CROP_SIZE", 512)
        check_crop_size(size)
        views = np.empty((len(cameras), size, size, 3), np.uint8)
        Sphere(_panorama(request), size).crops(cameras, views, threads=os.cpu_count() or 1)
        return {"CROPS": views}


def _cameras(rows):
    if len(rows) > _MAX_CAMERAS:
        raise InvalidInput(f"CAMERAS holds {len(rows)}; expected at most {_MAX_CAMERAS} a request")
    cameras = []
    for index, row in enumerate(rows):
        try:
            cameras.append(Camera.from_array(row))
        except ValueError as error:
            raise InvalidInput(f"CAMERAS[{index}]: {error}") from error
    return cameras


def _panorama(request):
    pixels = optional(request, "PANORAMA")
    encoded = optional(request, "ENCODED")
    if (pixels is None) == (encoded is None):
        both = "neither is" if pixels is None else "both are"
        raise InvalidInput(f"PANORAMA or ENCODED: {both} given; send exactly one of them")
    if pixels is None:
        return decode_image("ENCODED", encoded.item())
    check_panorama("PANORAMA", pixels)
    return pixels
