"""A second one-step network, toysr: graphs of a few nodes whose images can be told by hand.

A latent is the mean of 4×4 px, the denoiser predicts half of it less 20 times the mean of the prompt's
tokens, and the decoder repeats each latent 4×4 times. The tagger sees how red and how green an image is.
"""

from __future__ import annotations

import json
import shutil
import sys
import venv
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from panotriton.models.tags import Tags
from panotriton.pipeline.networks import Roles
from tests.server.graphs import save

ROOT = Path(__file__).parent.parent.parent
OSEDIFF = ROOT / "model_repository" / "osediff"

ROLES = Roles(
    text_encoder="toysr_words",
    encoder="toysr_shrink",
    denoiser="toysr_velocity",
    decoder="toysr_grow",
    tagger="toysr_colour",
)
TAGS = Tags(("red", "green"), np.array([0.5, 0.5], np.float32))
SIGMA = 0.8
SETTINGS = {
    "latent_channels": 3,
    "latent_overlap": 4,
    "latent_tile": 16,
    "sigma": SIGMA,
    "vae_scale_factor": 4,
    "models": asdict(ROLES),
}
WORDS = {"[UNK]": 0, "[PAD]": 1, "red": 2, "green": 3, "calm": 4}

GRAPHS = {
    "toysr_words": """(int64[b, 5] INPUT_IDS) => (float[b, 5, 1] PROMPT_EMBEDS) {
        last = Constant <value = int64[1] {2}> ()
        scale = Constant <value = float {20}> ()
        ids = Cast <to = 1> (INPUT_IDS)
        scaled = Mul(ids, scale)
        PROMPT_EMBEDS = Unsqueeze(scaled, last)
    }""",
    "toysr_shrink": """(uint8[b, H, W, 3] IMAGE) => (float[b, 3, h, w] LATENT) {
        pixels = Cast <to = 1> (IMAGE)
        planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
        LATENT = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (planes)
    }""",
    "toysr_velocity": """(float[b, 3, h, w] LATENT, float[b, 5, 1] PROMPT_EMBEDS)
            => (float[b, 3, h, w] NOISE) {
        half = Constant <value = float {0.5}> ()
        first = Constant <value = int64[1] {1}> ()
        last = Constant <value = int64[1] {3}> ()
        halved = Mul(LATENT, half)
        mean = ReduceMean(PROMPT_EMBEDS, first)
        prompt = Unsqueeze(mean, last)
        NOISE = Sub(halved, prompt)
    }""",
    "toysr_grow": """(float[b, 3, h, w] LATENT) => (uint8[b, H, W, 3] IMAGE) {
        low = Constant <value = float {0}> ()
        high = Constant <value = float {255}> ()
        scales = Constant <value = float[4] {1, 1, 4, 4}> ()
        clipped = Clip(LATENT, low, high)
        planes = Resize <mode = "nearest", nearest_mode = "floor",
            coordinate_transformation_mode = "asymmetric"> (clipped, , scales)
        pixels = Transpose <perm = [0, 2, 3, 1]> (planes)
        IMAGE = Cast <to = 2> (pixels)
    }""",
    "toysr_colour": """(uint8[b, 384, 384, 3] IMAGE) => (float[b, 2] PROBABILITY) {
        axes = Constant <value = int64[2] {1, 2}> ()
        both = Constant <value = int64[2] {0, 1}> ()
        most = Constant <value = float {255}> ()
        pixels = Cast <to = 1> (IMAGE)
        means = ReduceMean <keepdims = 0> (pixels, axes)
        two = Gather <axis = 1> (means, both)
        PROBABILITY = Div(two, most)
    }""",
}
CONFIGS = {
    "toysr_words": """max_batch_size: 4
        input [ { name: "INPUT_IDS" data_type: TYPE_INT64 dims: [ 5 ] } ]
        output [ { name: "PROMPT_EMBEDS" data_type: TYPE_FP32 dims: [ 5, 1 ] } ]""",
    "toysr_shrink": """max_batch_size: 4
        input [ { name: "IMAGE" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] } ]
        output [ { name: "LATENT" data_type: TYPE_FP32 dims: [ 3, -1, -1 ] } ]""",
    "toysr_velocity": """max_batch_size: 8
        input [ { name: "LATENT" data_type: TYPE_FP32 dims: [ 3, -1, -1 ] },
                { name: "PROMPT_EMBEDS" data_type: TYPE_FP32 dims: [ 5, 1 ] } ]
        output [ { name: "NOISE" data_type: TYPE_FP32 dims: [ 3, -1, -1 ] } ]""",
    "toysr_grow": """max_batch_size: 4
        input [ { name: "LATENT" data_type: TYPE_FP32 dims: [ 3, -1, -1 ] } ]
        output [ { name: "IMAGE" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] } ]""",
    "toysr_colour": """max_batch_size: 4
        input [ { name: "IMAGE" data_type: TYPE_UINT8 dims: [ 384, 384, 3 ] } ]
        output [ { name: "PROBABILITY" data_type: TYPE_FP32 dims: [ 2 ] } ]""",
}


def install(folder: Path) -> tuple[Path, Path]:
    """A Python environment whose package `panotriton` has the toy's arithmetic, too.

    Returns its interpreter, and the package's folder `models`. Other packages are this environment's.
    """
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/*/site-packages")
    ignored = shutil.ignore_patterns("__pycache__")
    package = shutil.copytree(ROOT / "client" / "panotriton", site / "panotriton", ignore=ignored)
    shutil.copyfile(Path(__file__).with_name("toysr_network.py"), package / "models" / "toysr.py")
    others = (path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    (site / "others.pth").write_text("\n".join(others))
    return folder / "bin" / "python", package / "models"


def build(repository: Path) -> Path:
    """The folders that the toy adds to a repository: a front as osediff's but for its name, and networks."""
    for name, text in GRAPHS.items():
        graph = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {name} {text}')
        onnx.checker.check_model(graph, full_check=True)
        config = f"{CONFIGS[name]}\ninstance_group [ {{ kind: KIND_CPU count: 1 }} ]\ndynamic_batching {{}}"
        save(repository, name, graph, config)
    version = repository / "toysr" / "1"
    version.mkdir(parents=True)
    shutil.copyfile(OSEDIFF / "1" / "model.py", version / "model.py")
    config = (OSEDIFF / "config.pbtxt").read_text().replace('"osediff"', '"toysr"')
    (version.parent / "config.pbtxt").write_text(config)
    (version / "toysr.json").write_text(json.dumps(SETTINGS))
    _tokenizer().save(str(version / "tokenizer.json"))
    TAGS.write(version)
    return repository


def _tokenizer() -> Tokenizer:
    """Words and commas, padded to 5 tokens."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=5, pad_id=WORDS["[PAD]"], pad_token="[PAD]")
    return tokenizer


def expected(image: np.ndarray, tokens: list[str]) -> np.ndarray:
    """What toysr makes of `image` (h, w, 3) at upscale 2 without colour alignment."""
    height, width = (2 * side // 4 * 4 for side in image.shape[:2])
    twice = Image.fromarray(image).resize((2 * image.shape[1], 2 * image.shape[0]))
    source = np.asarray(twice.resize((width, height), Image.Resampling.LANCZOS), np.float64)
    latent = source.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3))
    prompt = 20 * np.mean([WORDS.get(token, 0) for token in tokens])
    clean = latent - SIGMA * (latent / 2 - prompt)
    return clean.clip(0, 255).repeat(4, 0).repeat(4, 1)  # (H, W, 3)
