"""options: a group's options, checked and completed before any work is done."""

from panotriton.models.requests import read_options, respond


class TritonPythonModel:
    def execute(self, requests):
        return respond(requests, lambda request: read_options(request).completed().tensors())
