"""decode: one encoded image (JPEG, PNG, WebP) → RGB uint8 (H, W, 3)."""

from panotriton import serving
from panotriton.images import decode_image


class TritonPythonModel:
    def execute(self, requests):
        return serving.respond(requests, self._decode)

    @staticmethod
    def _decode(request):
        data = serving.required(request, "ENCODED").item()
        return {"IMAGE": decode_image("ENCODED", data)}
