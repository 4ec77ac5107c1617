"""tap: hands an intermediate tensor of an ensemble out as it is."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        # The tensor itself, already in shared memory: nothing is copied here.
        return [pb_utils.InferenceResponse(request.inputs()) for request in requests]
