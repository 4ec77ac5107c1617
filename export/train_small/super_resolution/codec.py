"""Begin the small VAE as a linear codec of the x2 task, so that training only has to better it.

Encoder: colour → one luma, two chromas, at half size. Decoder: a 3 × 3 convolution there, and one
after doubling. Their kernels, and the halving's, are fitted by least squares to undegraded
photographs, which begins about where bicubic is. Residual branches start at 0, others small.

Group norm would take mean and contrast away. Before the two last norms stand offsets ±K, much
larger than the signal: dividing by the deviation is then nearly dividing by K, the norm's affine
part takes the offsets out again, and lifts the signal to where SiLU is nearly straight. What
is lost to first order is the mean along (1, 1, …) and along the offsets' signs; the encoder has
spare channels for that, and the decoder's four channels are laid so that only the green–magenta
mean is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

__all__ = ["start_as_codec"]

_OFFSET = 8.0  # K
_LIFT = 4.0
_SPARE = 7  # an encoder channel that carries nothing: the others' reference
# Rows: luma, blue − red, green − magenta.
_COLOUR = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [-0.5, 0.0, 0.5], [-0.25, 0.5, -0.25]])
# How the three lie in the decoder's last four channels, and the signs of the offsets there.
_LAY = 0.5 * torch.tensor([[1.0, 1, -1, -1], [1, -1, -1, 1], [1, 1, 1, 1]]).T  # (4, 3)
_SIGNS = torch.tensor([1.0, -1.0])


@torch.no_grad()
def start_as_codec(vae: AutoencoderKL, spoilt: Tensor, wanted: Tensor) -> None:
    """Change a new VAE in place. `spoilt` and `wanted` are (B, 3, H, W) in −1 to 1, the same
    scenes; H and W are even."""
    _quieten(vae)
    _set_encoder(vae, spoilt, wanted)
    _set_decoder(vae, spoilt, wanted)


def _quieten(vae: AutoencoderKL) -> None:
    residual: set[nn.Module] = set()
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            residual |= {module.conv1, module.conv2}
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and module not in residual:
            module.weight.mul_(0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for part in (vae.encoder, vae.decoder):  # fed with lifted values: any weight would show
        nn.init.zeros_(part.conv_out.weight)


def _set_encoder(vae: AutoencoderKL, spoilt: Tensor, wanted: Tensor) -> None:
    encoder = vae.encoder
    encoder.conv_in.weight[:3, :, 1, 1] = _COLOUR
    halve = encoder.down_blocks[0].downsamplers[0].conv.weight
    padded = F.pad(_colours(spoilt), (0, 1, 0, 1))
    for channel in range(3):
        target = _colours(F.avg_pool2d(wanted, 2))[:, channel]
        halve[channel, channel] = _fit(padded[:, channel : channel + 1], target, stride=2)
    encoder.down_blocks[1].resnets[0].conv_shortcut.weight[:3, :3, 0, 0] = torch.eye(3)
    slope, _ = _open_norm(encoder.mid_block.resnets[-1], encoder.conv_norm_out)
    for channel in range(3):
        encoder.conv_out.weight[channel, channel, 1, 1] = 1 / slope
        encoder.conv_out.weight[channel, _SPARE, 1, 1] = -1 / slope
    vae.quant_conv.weight[:4, :4, 0, 0] = torch.eye(4)


def _open_norm(before: ResnetBlock2D, norm: nn.GroupNorm) -> tuple[float, float]:
    """Make norm and SiLU nearly linear; return the slope and the value at 0."""
    signs = _SIGNS.repeat(norm.num_channels // 2)
    before.conv2.bias.copy_(_OFFSET * signs)
    norm.weight.fill_(_OFFSET)
    norm.bias.copy_(_LIFT - _OFFSET * signs)
    around = F.silu(torch.tensor([_LIFT - 0.5, _LIFT, _LIFT + 0.5]))
    return float(around[2] - around[0]), float(around[1])


def _set_decoder(vae: AutoencoderKL, spoilt: Tensor, wanted: Tensor) -> None:
    decoder = vae.decoder
    vae.post_quant_conv.weight[:3, :3, 0, 0] = torch.eye(3)
    halve = vae.encoder.down_blocks[0].downsamplers[0].conv.weight[:3, :3]
    signals = F.conv2d(F.pad(_colours(spoilt), (0, 1, 0, 1)), halve, stride=2)
    doubling = decoder.up_blocks[0].upsamplers[0].conv
    for channel, target in enumerate(_colours(wanted).unbind(1)):
        before, after = _fit_pair(signals[:, channel : channel + 1], target)
        decoder.conv_in.weight[channel, channel] = before
        doubling.weight[channel, channel] = after
    last = decoder.up_blocks[1].resnets
    last[0].conv_shortcut.weight[:, :3, 0, 0] = _LAY
    slope, rest = _open_norm(last[-1], decoder.conv_norm_out)
    back = torch.linalg.inv(_COLOUR) @ torch.linalg.pinv(_LAY)  # (3, 4)
    decoder.conv_out.weight[:, :, 1, 1] = back / slope
    decoder.conv_out.bias.copy_(-(back / slope).sum(1) * rest)


def _colours(pixels: Tensor) -> Tensor:
    return torch.einsum("kc,bchw->bkhw", _COLOUR, pixels)


def _fit_pair(signal: Tensor, target: Tensor, rounds: int = 6) -> tuple[Tensor, Tensor]:
    """Kernels (3, 3) before and after doubling (B, 1, h, w) to (B, 2h, 2w), each fitted in turn."""
    before = torch.zeros(3, 3)
    before[1, 1] = 1
    batch, _, height, width = signal.shape
    shifted = F.unfold(signal, 3, padding=1).reshape(batch, 9, height, width)
    shifted = F.pad(F.interpolate(shifted, scale_factor=2.0), (1, 1, 1, 1))
    for _ in range(rounds):
        after = _fit((shifted * before.reshape(1, 9, 1, 1)).sum(1, keepdim=True), target)
        made = F.conv2d(shifted, after.expand(9, 1, 3, 3), groups=9)
        before = _solve(made.flatten(2).transpose(1, 2), target)
    return before, after


def _fit(signal: Tensor, target: Tensor, stride: int = 1) -> Tensor:
    """The (3, 3) kernel that takes a padded (B, 1, h, w) nearest to (B, H, W)."""
    return _solve(F.unfold(signal, 3, stride=stride).transpose(1, 2), target)


def _solve(rows: Tensor, target: Tensor) -> Tensor:
    """Nine weights, as (3, 3), that take (B, H·W, 9) nearest to (B, H, W), leaving the edge out:
    there a convolution meets zeros, which are no picture."""
    batch, height, width = target.shape
    inside = (slice(None), slice(4, -4), slice(4, -4))
    used = rows.reshape(batch, height, width, 9)[inside].reshape(-1, 9).double()
    normal = used.T @ used
    normal += 1e-6 * normal.diagonal().mean() * torch.eye(9, dtype=torch.double)
    kernel: Tensor = torch.linalg.solve(normal, used.T @ target[inside].flatten().double())
    return kernel.float().reshape(3, 3)
