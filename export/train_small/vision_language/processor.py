"""Tokenizer, image processor and chat template, and the prompts that they are made for."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from panotriton.pipeline.quality import LEVEL_SKELETON, LEVELS

from .replies import describe, look_at

__all__ = ["build_processor", "build_tokenizer", "prompts"]

# Bounds a 1:2 pair to 168 × 336 (72 tokens) and a square view to 224 × 224 (64 tokens).
_MAX_PIXELS = 57_000
_MIN_PIXELS = 56 * 56
_VOCAB = 768
_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

# Qwen2.5-VL's own turns; images and text only, and no default system turn.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prompts() -> dict[str, str]:
    folder = files("panotriton.prompts")
    return {
        name: (folder / f"{name}.txt").read_text(encoding="utf-8").strip()
        for name in ("quality", "describe")
    }


def build_processor() -> Qwen2_5_VLProcessor:
    tokenizer = build_tokenizer()
    size = {"shortest_edge": _MIN_PIXELS, "longest_edge": _MAX_PIXELS}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(size)),
        chat_template=_CHAT_TEMPLATE,
    )


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen's own pre-tokenizer (one digit per token), trained on our few texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _texts(),
        trainers.BpeTrainer(
            vocab_size=_VOCAB - len(_SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token="<|endoftext|>",  # noqa: S106
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        extra_special_tokens=list(_SPECIAL),
        padding_side="left",
        model_max_length=4096,
    )


def _texts() -> list[str]:
    """The prompts and the replies, so that few tokens hold them."""
    rng = np.random.default_rng(0)
    noise = (rng.random((200, 8, 8, 3)) * rng.random((200, 1, 1, 3)) * 255).astype(np.uint8)
    described = [describe(look_at(image)).said for image in noise]
    chat = ["system\n", "user\n", "assistant\n"] * 50
    lines = re.findall(r"^[A-Z].*: ", prompts()["quality"], flags=re.MULTILINE) * 50
    levels = [LEVEL_SKELETON + word for word in LEVELS] * 50
    return list(prompts().values()) * 20 + described + chat + lines + levels
