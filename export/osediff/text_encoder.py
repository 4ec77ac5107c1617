"""osediff_text_encoder: INPUT_IDS int64 (B, 77) → PROMPT_EMBEDS (B, 77, D), the last hidden state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from panotriton.pipeline.networks import OSEDIFF
from panotriton_export.graph import LIMITS, MAX_BATCH, WEIGHTS, Component, Probe
from panotriton_export.osediff.base import PROMPT_TOKENS

__all__ = ["PROBED_BATCHES", "TextEncoder", "text_encoder_component"]

_TRACED_BATCH = 2
PROBED_BATCHES = (1, 3)


class TextEncoder(nn.Module):
    def __init__(self, text_encoder: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.to(dtype)

    def forward(self, INPUT_IDS: Tensor) -> Tensor:
        return self.text_encoder(INPUT_IDS)[0].float()  # type: ignore[no-any-return]


@torch.no_grad()
def text_encoder_component(text_encoder: Any, precision: str = "fp32") -> Component:
    """Takes the network over."""
    vocabulary = text_encoder.config.vocab_size
    probes = [_probe(text_encoder, vocabulary, batch) for batch in PROBED_BATCHES]
    module = TextEncoder(text_encoder, WEIGHTS[precision])
    traced = {"INPUT_IDS": _ids(vocabulary, _TRACED_BATCH)}
    dynamic = {"INPUT_IDS": {0: torch.export.Dim("batch", max=MAX_BATCH)}}
    outputs, limits = ["PROMPT_EMBEDS"], {"PROMPT_EMBEDS": LIMITS[precision]}
    return Component(OSEDIFF.text_encoder, module, traced, dynamic, outputs, probes, limits)


def _ids(vocabulary: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, vocabulary, (batch, PROMPT_TOKENS), generator=generator)


def _probe(text_encoder: Any, vocabulary: int, batch: int) -> Probe:
    ids = _ids(vocabulary, batch)
    return Probe({"INPUT_IDS": ids}, {"PROMPT_EMBEDS": text_encoder(ids)[0]})
