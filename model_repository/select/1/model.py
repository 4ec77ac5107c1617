"""select: scores → the intervals that reach the threshold, and the views to describe."""

from panotriton.errors import InvalidInput
from panotriton.models.requests import read_options, required, respond
from panotriton.pipeline.checks import check_images
from panotriton.pipeline.quality import filter_intervals


class TritonPythonModel:
    def execute(self, requests):
        return respond(requests, self._select)

    @staticmethod
    def _select(request):
        kept = filter_intervals(required(request, "SCORE"), read_options(request).threshold)
        pairs = required(request, "PAIRS_SR")
        check_images("PAIRS_SR", pairs)
        if len(pairs) != 16:
            raise InvalidInput(f"PAIRS_SR holds {len(pairs)} images; expected 16, one per score")
        right_2 = pairs[8:, :, pairs.shape[2] // 2 :]  # (8, h, w, 3) panorama 2's right halves
        return {"KEPT": kept, "RIGHT_VIEWS": right_2[kept - 1]}
