"""decode: one or two encoded images → RGB uint8 (H, W, 3) each."""

from concurrent.futures import ThreadPoolExecutor

from panotriton.models.requests import optional, respond
from panotriton.pipeline.images import decode_image

_OUTPUTS = {"ENCODED": "IMAGE", "ENCODED_2": "IMAGE_2"}


class TritonPythonModel:
    def initialize(self, args):
        self._pool = ThreadPoolExecutor(2)  # Pillow decodes without the interpreter lock

    def execute(self, requests):
        return respond(requests, self._decode)

    def finalize(self):
        self._pool.shutdown()

    def _decode(self, request):
        encoded = {name: optional(request, name) for name in _OUTPUTS}
        given = {name: data.item() for name, data in encoded.items() if data is not None}
        images = self._pool.map(decode_image, given.keys(), given.values())
        return {_OUTPUTS[name]: image for name, image in zip(given, images, strict=True)}
