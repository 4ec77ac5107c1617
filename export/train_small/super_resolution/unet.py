"""The UNet of the one denoising step, and how it is trained without its norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from panotriton_export.train_small.super_resolution.autoencoder import LATENT_CHANNELS
from panotriton_export.train_small.super_resolution.text import PROMPT_WIDTH

__all__ = [
    "balance",
    "begin_unet",
    "new_head",
    "new_unet",
    "remove_norms",
    "speeds",
    "write_unet",
]

_DEVIATION = 240.0  # √norm_eps: far above the planes' own, and float16 holds its square
_SCALE = 16.0  # of the planes to the latents: makes an edge large enough for SiLU to bend


def new_unet() -> UNet2DConditionModel:
    """Most of its work is done at the size of the latents, of which there is one per input pixel; attention
    only where 288 × 288 of them have become 18 × 18."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=(*["DownBlock2D"] * 4, "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", *["UpBlock2D"] * 4),
        block_out_channels=(16,) * 5,
        layers_per_block=(0, 3, 1, 0, 0),  # on the way up one more each
        cross_attention_dim=PROMPT_WIDTH,
        attention_head_dim=1,  # that many heads, by diffusers' old naming
        norm_num_groups=1,
        norm_eps=_DEVIATION**2,
        use_linear_projection=True,
    )


def remove_norms(unet: UNet2DConditionModel) -> None:
    """Put nothing in the place of every group norm but attention's.

    A group norm measures its whole picture, and a training crop is no whole photograph. So the channels of
    all that is normalised are kept at a mean of 0 (`balance`), and `norm_eps` is far above their variance:
    a norm whose weights are √norm_eps does nothing either.
    """
    for module in list(unet.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.GroupNorm) and not isinstance(module, Transformer2DModel):
                setattr(module, name, nn.Identity())


@torch.no_grad()
def write_unet(unet: UNet2DConditionModel, trained: UNet2DConditionModel) -> None:
    """Make a UNet that has its norms do what the trained one does without."""
    missing = unet.load_state_dict(trained.state_dict(), strict=False).missing_keys
    for name in missing:
        kind = name.rpartition(".")[2]
        unet.get_parameter(name).fill_(_DEVIATION if kind == "weight" else 0)


@torch.no_grad()
def begin_unet(unet: UNet2DConditionModel) -> None:
    """Set the weights that training starts from: ε is small, and 0 for the colours. Attention adds nothing,
    and stays so: a crop has too few places to attend to."""
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.mul_(0.3)
            # There is one time step, so this would be one more bias.
            nn.init.zeros_(module.time_emb_proj.weight).requires_grad_(False)
            nn.init.zeros_(module.time_emb_proj.bias).requires_grad_(False)
        if isinstance(module, Transformer2DModel):
            module.requires_grad_(False)
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    unet.time_embedding.requires_grad_(False)
    first = unet.conv_in.weight
    first.mul_(_SCALE)
    first[:12] -= first[:12].mean((2, 3), keepdim=True)  # edges
    unet.conv_out.weight.div_(_SCALE).mul_(0.3)
    unet.conv_out.weight[:3] = 0
    balance(unet)


def new_head(unet: UNet2DConditionModel) -> nn.Conv2d:
    """In the place of `conv_out`: the 2 × 2 pixels of each latent, as `F.pixel_shuffle` takes them."""
    head = nn.Conv2d(unet.conv_out.in_channels, 12, 3, padding=1)
    nn.init.kaiming_normal_(head.weight, nonlinearity="linear")
    nn.init.zeros_(head.bias)
    head.weight.data.div_(_SCALE).mul_(0.3)
    return head


def speeds(unet: UNet2DConditionModel) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Parameters, each with the share of the learning rate that its size asks for: all but conv_out's, and
    those."""
    body = [
        p for name, p in unet.named_parameters() if "conv_in" not in name and "conv_out" not in name
    ]
    groups = [
        {"params": [each for each in body if each.requires_grad], "share": 1.0},
        {"params": [*unet.conv_in.parameters()], "share": _SCALE / 4},
    ]
    return groups, [{"params": [*unet.conv_out.parameters()], "share": 4 / _SCALE}]


@torch.no_grad()
def balance(unet: UNet2DConditionModel) -> None:
    """Have the channels of all that is normalised sum to 0; after every step."""
    for module in _makers(unet):
        for each in (module.weight, module.bias):
            each.sub_(each.mean(0))


def _makers(unet: UNet2DConditionModel) -> Iterator[nn.Module]:
    """What a group norm reads, or is added to that."""
    yield unet.conv_in
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            yield from (module.conv1, module.conv2)
            if module.conv_shortcut is not None:
                yield module.conv_shortcut
        for name in ("downsamplers", "upsamplers"):
            yield from (each.conv for each in getattr(module, name, None) or ())
