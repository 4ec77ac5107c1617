"""A repository for tests of the client: the real pipeline around networks that take milliseconds.

osediff, qwen_scorer and qwen_describer keep their configs and get the models below; decode,
preprocess, select, interpolate, crop, the ensembles and panorama_stream are the real ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from panotriton.server.repository import OPTIONAL

ROOT = Path(__file__).parent.parent.parent

# The networks of osediff: its VAE keeps an eighth of the pixels, its UNet finds no noise to speak of.
# PROMPT "slow" takes half a second per call; "fail" fails.
TEXT_ENCODER = """
import numpy as np
from panotriton.models.requests import required, respond

class TritonPythonModel:
    def execute(self, requests):
        return respond(requests, self._work)

    @staticmethod
    def _work(request):
        ids = required(request, "INPUT_IDS")  # (1, 77)
        return {"PROMPT_EMBEDS": np.repeat(ids[..., None], 1024, -1).astype(np.float32)}
"""
VAE_ENCODER = """
import cv2, numpy as np
from panotriton.models.requests import required, respond

class TritonPythonModel:
    def execute(self, requests):
        return respond(requests, self._work)

    @staticmethod
    def _work(request):
        image = required(request, "IMAGE")[0]
        h, w = (side // 8 for side in image.shape[:2])
        latent = np.zeros((1, 4, h, w), np.float32)
        small = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
        latent[0, :3] = small.transpose(2, 0, 1)
        return {"LATENT": latent}
"""
UNET = """
import time, numpy as np
from panotriton.models.requests import required, respond
from panotriton.errors import InferenceFailed

class TritonPythonModel:
    def execute(self, requests):
        return respond(requests, self._work)

    @staticmethod
    def _work(request):
        prompt = required(request, "PROMPT_EMBEDS")[0, 0, 0]
        if prompt == SLOW:
            time.sleep(0.5)
        if prompt == FAIL:
            raise InferenceFailed("the stand-in fails when asked to")
        return {"NOISE": required(request, "LATENT") * np.float32(2**0.5 - 1)}
"""
VAE_DECODER = """
import cv2, numpy as np
from panotriton.models.requests import required, respond

class TritonPythonModel:
    def execute(self, requests):
        return respond(requests, self._work)

    @staticmethod
    def _work(request):
        latent = required(request, "LATENT")[0, :3].clip(0, 255)
        h, w = (side * 8 for side in latent.shape[1:])
        return {"IMAGE": cv2.resize(latent.transpose(1, 2, 0).astype(np.uint8), (w, h))[None]}
"""
WORDS = {"[UNK]": 0, "[PAD]": 1, "slow": 2, "fail": 3}
SETTINGS = {
    "alpha_cumprod": 0.5,
    "latent_channels": 4,
    "latent_overlap": 8,
    "latent_tile": 16,
    "process_size": 16,
    "vae_scale_factor": 8,
}
# Scores by the pixels, spread over 0.5 to 1.
SCORER = """
import numpy as np
from panotriton.models.requests import required, respond, strings

class TritonPythonModel:
    def execute(self, requests):
        return respond(requests, self._work)

    @staticmethod
    def _work(request):
        images = required(request, "IMAGES")
        finals = [0.5 + int(image.astype(np.int64).sum()) % 51 / 100 for image in images]
        return {
            "SCORE": np.array(finals, np.float32),
            "SUB_SCORES": np.full((len(images), 5), 0.5, np.float32),
            "RAW_OUTPUT": strings([f"Final Score: {final:.2f}" for final in finals]),
        }
"""
DESCRIBER = """
from panotriton.models.requests import required, respond, strings

class TritonPythonModel:
    def execute(self, requests):
        return respond(requests, self._work)

    @staticmethod
    def _work(request):
        means = required(request, "IMAGES").mean((1, 2, 3))
        texts = [f"Mean level {mean:.1f}." if mean else "" for mean in means]  # none of black
        return {
            "DESCRIPTION": strings(texts),
            "DESCRIPTION_ERROR": strings(["" if text else "it is dark" for text in texts]),
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
_STANDINS = {
    "osediff_text_encoder": TEXT_ENCODER,
    "osediff_vae_encoder": VAE_ENCODER,
    "osediff_unet": UNET.replace("SLOW", str(WORDS["slow"])).replace("FAIL", str(WORDS["fail"])),
    "osediff_vae_decoder": VAE_DECODER,
    "qwen_scorer": SCORER,
    "qwen_describer": DESCRIBER,
}


def build(folder: Path) -> Path:
    """Write the repository to `folder`."""
    source = ROOT / "model_repository"
    for config in source.glob("*/config.pbtxt"):
        name = config.parent.name
        if name not in (*_STANDINS, *OPTIONAL, "qwen"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(config.parent, folder / name, ignore=ignored)
    for name, code in _STANDINS.items():
        text = (source / name / "config.pbtxt").read_text()
        _write(folder / name, text.replace('"onnxruntime"', '"python"'), code)
    for name in ("osediff", "panorama_stream"):
        (folder / name / "1" / "osediff.json").write_text(json.dumps(SETTINGS))
        tokenizer().save(str(folder / name / "1" / "tokenizer.json"))
    _write(folder / "echo", ECHO_CONFIG, ECHO)
    return folder


def tokenizer() -> Tokenizer:
    """Reads one known word and pads to the 77 tokens of a prompt."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(77)
    tokenizer.enable_padding(length=77, pad_id=WORDS["[PAD]"], pad_token="[PAD]")
    return tokenizer


def _write(folder: Path, config: str, code: str) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config)
    (folder / "1" / "model.py").write_text(code)
