"""A repository for tests of the client: the real pipeline around networks that take milliseconds.

osediff, qwen_scorer and qwen_describer keep their configs and get the models below; decode,
preprocess, select, interpolate, crop, the ensembles and panorama_stream are the real ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# Upscales by interpolation. PROMPT "slow" takes half a second, unless cancelled; "fail" fails.
OSEDIFF = """
import time, cv2, numpy as np
from panotriton import serving
from panotriton.errors import InferenceFailed

class TritonPythonModel:
    def execute(self, requests):
        return serving.respond(requests, self._work)

    @staticmethod
    def _work(request):
        images = serving.required(request, "IMAGES")
        scale = serving.number(request, "UPSCALE", 2)
        prompt = serving.text(request, "PROMPT", "")
        for _ in range(25 if prompt == "slow" else 0):
            time.sleep(0.02)
            if request.is_cancelled():
                raise InferenceFailed("cancelled")
        if prompt == "fail":
            raise InferenceFailed("the stand-in fails when asked to")
        h, w = (side * scale // 8 * 8 for side in images.shape[1:3])
        sharp = [cv2.resize(image, (w, h)) for image in images]
        return {"IMAGES_SR": np.array(sharp, np.uint8).reshape(-1, h, w, 3)}
"""
# Scores by the pixels, spread over 0.5 to 1.
SCORER = """
import numpy as np
from panotriton import serving

class TritonPythonModel:
    def execute(self, requests):
        return serving.respond(requests, self._work)

    @staticmethod
    def _work(request):
        images = serving.required(request, "IMAGES")
        finals = [0.5 + int(image.astype(np.int64).sum()) % 51 / 100 for image in images]
        return {
            "SCORE": np.array(finals, np.float32),
            "SUB_SCORES": np.full((len(images), 5), 0.5, np.float32),
            "RAW_OUTPUT": serving.texts([f"Final Score: {final:.2f}" for final in finals]),
        }
"""
DESCRIBER = """
from panotriton import serving

class TritonPythonModel:
    def execute(self, requests):
        return serving.respond(requests, self._work)

    @staticmethod
    def _work(request):
        means = serving.required(request, "IMAGES").mean((1, 2, 3))
        texts = [f"Mean level {mean:.1f}." for mean in means]
        return {
            "DESCRIPTION": serving.texts(texts),
            "DESCRIPTION_ERROR": serving.texts([""] * len(texts)),
        }
"""
# Hands back what it gets, and says how long it took over it.
ECHO_CONFIG = """
name: "echo"
backend: "python"
max_batch_size: 0
input [ { name: "IMAGES" data_type: TYPE_UINT8 dims: [ -1, -1, -1, 3 ] } ]
output [ { name: "IMAGES_OUT" data_type: TYPE_UINT8 dims: [ -1, -1, -1, 3 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
ECHO = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([self._echo(request)]) for request in requests]

    @staticmethod
    def _echo(request):
        tensor = pb_utils.get_input_tensor_by_name(request, "IMAGES")
        return pb_utils.Tensor("IMAGES_OUT", tensor.as_numpy())
"""
_STANDINS = {"osediff": OSEDIFF, "qwen_scorer": SCORER, "qwen_describer": DESCRIBER}


def build(folder: Path) -> Path:
    """Write the repository to `folder`."""
    source = ROOT / "model_repository"
    for config in source.glob("*/config.pbtxt"):
        name = config.parent.name
        if name not in _STANDINS and name != "qwen" and not name.startswith("osediff_"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(config.parent, folder / name, ignore=ignored)
    for name, code in _STANDINS.items():
        _write(folder / name, (source / name / "config.pbtxt").read_text(), code)
    _write(folder / "echo", ECHO_CONFIG, ECHO)
    return folder


def _write(folder: Path, config: str, code: str) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config)
    (folder / "1" / "model.py").write_text(code)
