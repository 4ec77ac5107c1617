"""RAM as a tagger: IMAGE uint8 (B, 384, 384, 3) RGB → PROBABILITY fp32 (B, T), one of each tag.

"Recognize Anything: A Strong Image Tagging Model", Zhang et al., 2023: a Swin encoder, and two layers in
which the tags' text embeddings attend to the image, as in Query2Label (Liu et al., 2021).
Both are transformers' modules: Swin is the original's, and the layers of BLIP's text model are
those of the BERT with cross-attention from which RAM's were taken. RAM's captioning half is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipTextConfig, SwinConfig, SwinModel
from transformers.models.blip.modeling_blip_text import (
    BlipTextAttention,
    BlipTextIntermediate,
    BlipTextOutput,
)

from panotriton.models.tags import TAGGED_PX

__all__ = ["HEADS", "MEAN", "STD", "WINDOW", "Sizes", "Tagger"]

WINDOW = 12  # of Swin at 384 px
HEADS = 4  # of the tagging layers: no shape in a checkpoint tells
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB of [0, 1]
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What differs from one RAM to another. depths, heads: of Swin, one per stage.

    text_width: of the tags' embeddings and the image tokens; width, inner_width: of the tagging layers.
    """

    embed_width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    text_width: int
    width: int
    inner_width: int
    layers: int
    tags: int


class Tagger(nn.Module):
    """In fp32, or after `to(torch.float16)` in fp16 with fp32 probabilities."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.swin = SwinModel(_swin_config(sizes), add_pooling_layer=False)
        self.image_proj = nn.Linear(self.swin.num_features, sizes.text_width)
        self.label_embed = nn.Parameter(torch.zeros(sizes.tags, sizes.text_width))
        self.wordvec_proj = nn.Linear(sizes.text_width, sizes.width)
        config = _layer_config(sizes)
        self.tagging_head = nn.ModuleList(_Layer(config) for _ in range(sizes.layers))
        self.fc = nn.Linear(sizes.width, 1)
        self.requires_grad_(False).eval()

    def forward(self, IMAGE: Tensor) -> Tensor:
        context = self.image_proj(self._image_tokens(IMAGE))  # (B, 145, text_width)
        tags = F.relu(self.wordvec_proj(self.label_embed))[None]  # (1, T, width) for all images
        for layer in self.tagging_head:
            tags = layer(tags, context)  # (B, T, width)
        return self.fc(tags).squeeze(-1).float().sigmoid()  # type: ignore[no-any-return]

    def _image_tokens(self, image: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        pixels = (image.float().permute(0, 3, 1, 2) / 255 - mean) / std  # (B, 3, 384, 384)
        tokens = self.swin(pixels.to(self.fc.weight.dtype)).last_hidden_state  # (B, 144, C)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)  # the average stands first


class _Layer(nn.Module):
    """Cross-attention and a feed-forward part; no self-attention."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__()
        self.crossattention = BlipTextAttention(config, is_cross_attention=True)
        self.intermediate = BlipTextIntermediate(config)
        self.output = BlipTextOutput(config)

    def forward(self, tags: Tensor, context: Tensor) -> Tensor:
        attended, _ = self.crossattention(tags, encoder_hidden_states=context)
        return self.output(self.intermediate(attended), attended)  # type: ignore[no-any-return]


def _swin_config(sizes: Sizes) -> SwinConfig:
    return SwinConfig(
        image_size=TAGGED_PX,
        embed_dim=sizes.embed_width,
        depths=list(sizes.depths),
        num_heads=list(sizes.heads),
        window_size=WINDOW,
        drop_path_rate=0.0,
    )


def _layer_config(sizes: Sizes) -> BlipTextConfig:
    return BlipTextConfig(
        hidden_size=sizes.width,
        encoder_hidden_size=sizes.text_width,
        intermediate_size=sizes.inner_width,
        num_attention_heads=HEADS,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )
