"""osediff_tagger: IMAGE uint8 (B, 384, 384, 3) RGB → PROBABILITY fp32 (B, T), an ONNX component."""

from __future__ import annotations

import torch
from torch import Tensor

from panotriton.models.tags import TAGGED_PX
from panotriton.pipeline.networks import OSEDIFF
from panotriton_export.graph import LIMITS, MAX_BATCH, WEIGHTS, Component, Probe
from panotriton_export.tagger.model import Tagger

__all__ = ["NAME", "tagger_component"]

NAME = OSEDIFF.tagger
_TRACED_BATCH = 2
PROBED_BATCHES = (1, 3)


@torch.no_grad()
def tagger_component(tagger: Tagger, precision: str = "fp32") -> Component:
    """Takes the network over."""
    probes = [_probe(tagger, batch) for batch in PROBED_BATCHES]
    module = tagger.to(WEIGHTS[precision])
    traced = {"IMAGE": _images(_TRACED_BATCH)}
    dynamic = {"IMAGE": {0: torch.export.Dim("batch", max=MAX_BATCH)}}
    limits = {"PROBABILITY": LIMITS[precision]}
    return Component(NAME, module, traced, dynamic, ["PROBABILITY"], probes, limits)


def _probe(tagger: Tagger, batch: int) -> Probe:
    images = _images(batch)
    return Probe({"IMAGE": images}, {"PROBABILITY": tagger(images)})


def _images(batch: int) -> Tensor:
    """Blots of some size each, and noise: what looks at windows sees more than a mean."""
    generator = torch.Generator().manual_seed(batch)
    blots = torch.rand(batch, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(blots, TAGGED_PX, mode="bilinear")
    noise = torch.randn(smooth.shape, generator=generator) * 0.1
    return ((smooth + noise).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1)
