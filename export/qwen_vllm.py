"""A Qwen-VL folder served by Triton's vLLM backend: the model `qwen_vllm`, which `qwen` asks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from panotriton.errors import ExportError
from panotriton.models.qwen import open_processor
from panotriton.models.qwen_vllm import TOP_TOKENS

__all__ = ["NAME", "engine_arguments", "export_vllm", "split_template"]

NAME = "qwen_vllm"
_CONFIG = """\
# Qwen-VL on vLLM, which `qwen` asks image by image. 1/model.json holds the engine's arguments.
name: "qwen_vllm"
backend: "vllm"
# vLLM joins requests itself, token by token.
max_batch_size: 0
model_transaction_policy { decoupled: true }

input [
  # The whole chat, with the template's mark where the image goes.
  { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
  # Base64 of encoded images; one here.
  { name: "image" data_type: TYPE_STRING dims: [ -1 ] optional: true },
  # vLLM's SamplingParams as JSON.
  { name: "sampling_parameters" data_type: TYPE_STRING dims: [ 1 ] optional: true },
  { name: "exclude_input_in_output" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "return_logprobs" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
]
output [
  { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] },
  # JSON: of each position the likeliest tokens.
  { name: "logprobs" data_type: TYPE_STRING dims: [ -1 ] }
]

# vLLM chooses the devices itself.
instance_group [ { kind: KIND_MODEL count: 1 } ]
"""
_MARK = "\u27e6system prompt\u27e7"  # in no template and no prompt
_OTHER_TOKENS = 1024 + 2048  # prompts, and the longest reply that `qwen` allows
_GPU_SHARE = 0.6  # the super-resolution networks need the rest


def export_vllm(
    model: Path, repository: Path, *, max_pixels: int | None, dtype: str
) -> dict[str, Any]:
    """Write qwen_vllm and return what `qwen` has to know: the chat around a prompt, the sampling."""
    processor = open_processor(model)
    version = repository / NAME / "1"
    version.mkdir(parents=True, exist_ok=True)
    (version.parent / "config.pbtxt").write_text(_CONFIG)
    arguments = engine_arguments(model, processor, max_pixels, dtype)
    (version / "model.json").write_text(json.dumps(arguments, indent=1) + "\n")
    # It only passes on: a GPU instance would hold a CUDA context for nothing.
    config = repository / "qwen" / "config.pbtxt"
    config.write_text(re.sub(r"kind: KIND_AUTO", "kind: KIND_CPU", config.read_text()))
    before, after = split_template(processor)
    return {"before": before, "after": after, "sampling": _sampling(model)}


def engine_arguments(
    model: Path, processor: Any, max_pixels: int | None, dtype: str
) -> dict[str, Any]:
    """AsyncEngineArgs by name. A longer context than the largest image needs would only cost memory."""
    vision = AutoConfig.from_pretrained(model, trust_remote_code=False).vision_config
    pixels = max_pixels or processor.image_processor.size["longest_edge"]
    tokens = pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
    return {
        "model": str(model.absolute()),
        "load_format": "safetensors",
        "trust_remote_code": False,
        "dtype": dtype,
        "max_model_len": tokens + _OTHER_TOKENS,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "mm_processor_kwargs": {"max_pixels": pixels},
        "enable_prefix_caching": True,
        "gpu_memory_utilization": _GPU_SHARE,
        "max_num_seqs": 64,
        "max_logprobs": TOP_TOKENS,
        "seed": 0,
    }


def split_template(processor: Any) -> tuple[str, str]:
    """What the chat template puts before the system prompt, and after it up to the reply."""
    turns = [
        {"role": "system", "content": _MARK},
        {"role": "user", "content": [{"type": "image"}]},
    ]
    chat = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before, mark, after = chat.partition(_MARK)
    if not mark:
        raise ExportError("the chat template leaves the system turn out: no prompt would arrive")
    return before, after


def _sampling(model: Path) -> dict[str, Any]:
    """The folder's repetition penalty, which PyTorch's `generate` applies by itself."""
    path = model / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: config[name] for name in ("repetition_penalty",) if name in config}
