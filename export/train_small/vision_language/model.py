"""The network, and how its patch embedding starts."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

__all__ = ["build_model", "start_patches"]


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """About 0.6 M parameters."""
    hidden, heads = 96, 4
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 224,
            "num_hidden_layers": 3,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 4, 4],  # half of the head's 24
            },
            "bos_token_id": None,
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
            "tie_word_embeddings": True,
            "initializer_range": 0.08,  # 0.02 is for widths in the thousands
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [2],
            "initializer_range": 0.12,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>")
    )
    return model


@torch.no_grad()
def start_patches(model: Qwen2_5_VLForConditionalGeneration, pixels: torch.Tensor) -> None:
    """Start the patch embedding as 64 cosine patterns, equally strong in the median of `pixels`
    (n, 1176), and the first gated layer as their magnitudes.

    Fine patterns are faint in pictures; made as strong as coarse ones, they let a tiny network
    see from the first step what blur, noise and blocks change.
    """
    weight = model.model.visual.patch_embed.proj.weight  # (64, 3, 2, 14, 14)
    patterns = (_cosines(14)[:, :, None] / 2).expand_as(weight)
    spread = (pixels @ patterns.flatten(1).T).abs().median(dim=0).values  # (64,)
    weight.copy_(patterns / spread[:, None, None, None, None])
    mlp: Any = model.model.visual.blocks[0].mlp  # silu(2z)·1 + silu(-2z)·1 is about |2z|
    mlp.gate_proj.weight.copy_(torch.cat([torch.eye(64), -torch.eye(64)]) * 2)  # (128, 64)
    mlp.up_proj.weight.mul_(0.1)
    mlp.up_proj.bias.fill_(1.0)


def _cosines(side: int) -> torch.Tensor:
    """64 orthonormal cosine patterns, (64, 3, side, side): 44 of luma, 10 each of two colours."""
    u = torch.arange(side)
    basis = torch.cos(math.pi * u[:, None] * (2 * u + 1) / (2 * side)) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)  # (frequency, position), orthonormal
    low = [(i, j) for i in range(6) for j in range(6) if i + j < 6]  # 21
    spread = [(i, j) for i in (0, 4, 7, 10, 13) for j in (0, 4, 7, 10, 13) if i + j > 5]
    spread.append((3, 3))  # 23
    colour = [(i, j) for i in range(4) for j in range(4) if i + j < 4]  # 10
    axes = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
    axes /= axes.norm(dim=1, keepdim=True)
    plan = [(0, f) for f in low + spread] + [(1, f) for f in colour] + [(2, f) for f in colour]
    patterns = [
        axes[c][:, None, None] * basis[i][:, None] * basis[j][None, :] for c, (i, j) in plan
    ]
    return torch.stack(patterns)
