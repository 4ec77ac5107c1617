"""options: a group's options, checked and completed before any work is done."""

from panotriton.models.requests import read_options, respond
from panotriton.pipeline.sizes import check_group


class TritonPythonModel:
    def execute(self, requests):
        return respond(requests, _options)


def _options(request):
    return check_group(read_options(request)).completed().tensors()
