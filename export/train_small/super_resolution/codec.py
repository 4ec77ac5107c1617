"""Begin the small VAE as a linear codec of the x2 task, so that training only has to better it.

Encoder: colour → one luma, two chromas, at half size. Decoder: a 3 × 3 convolution there, and one
after doubling. Their kernels, and the halving's, are fitted by least squares to undegraded
photographs, which begins about where bicubic is. Residual branches start at 0.

Of the eight channels three carry these signals, the next their sum's opposite, so that the mean of
all is 0, and two are free, at first random edges. The last two carry nothing but +K and −K, much
larger than any signal. Group norm's deviation is then nearly K/2 whatever the picture shows: a crop
is normalised as the photograph that it is of. The norms before the two last convolutions lift the
signals to where SiLU is straight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

__all__ = ["hold_carried", "start_as_codec"]

_CARRIED = torch.tensor([0.0, 0, 0, 0, 0, 0, 8, -8])  # K = 8
_DEVIATION = 4.0  # of _CARRIED
_GAIN = 4.0  # what the blocks see of a signal, for SiLU to bend it
_LIFT = 2.4  # where SiLU's second derivative is 0
_LOWERED = 0.5  # what of a signal is lifted
# Rows: luma, blue − red, green − magenta.
_COLOUR = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [-0.5, 0.0, 0.5], [-0.25, 0.5, -0.25]])


@torch.no_grad()
def start_as_codec(vae: AutoencoderKL, spoilt: Tensor, wanted: Tensor) -> None:
    """Change a new VAE in place. `spoilt` and `wanted` are (B, 3, H, W) in −1 to 1, the same
    scenes; H and W are even."""
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.copy_(_DEVIATION * (_CARRIED == 0))
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.norm1.weight.mul_(_GAIN)
            _carry(module.conv1)
            nn.init.zeros_(module.conv2.weight)
    _set_encoder(vae, spoilt, wanted)
    _set_decoder(vae, spoilt, wanted)


def hold_carried(vae: AutoencoderKL) -> None:
    """Keep training from what carries K, and from what would multiply it, K times as touchy as the rest."""
    signal = (_CARRIED == 0).float()
    makes, reads = signal.reshape(8, 1, 1, 1), signal.reshape(1, 8, 1, 1)
    resized = (
        vae.encoder.down_blocks[0].downsamplers[0].conv,
        vae.decoder.up_blocks[0].upsamplers[0].conv,
    )
    blocks = [module for module in vae.modules() if isinstance(module, ResnetBlock2D)]
    made = [vae.encoder.conv_in, vae.decoder.conv_in]
    for convolution in (*made, *resized, *(each for b in blocks for each in (b.conv1, b.conv2))):
        mask = makes * reads if convolution in resized else makes
        convolution.weight.register_hook(lambda gradient, mask=mask: gradient * mask)
        convolution.bias.register_hook(lambda gradient: gradient * signal)


def _set_encoder(vae: AutoencoderKL, spoilt: Tensor, wanted: Tensor) -> None:
    encoder = vae.encoder
    halve = encoder.down_blocks[0].downsamplers[0].conv
    _carry(encoder.conv_in)
    _carry(halve, reads=True)
    _only(encoder.conv_in, _COLOUR)
    padded = F.pad(_colours(spoilt), (0, 1, 0, 1))
    halve.weight[:3] = 0
    for channel in range(3):
        target = _colours(F.avg_pool2d(wanted, 2))[:, channel]
        halve.weight[channel, channel] = _fit(padded[:, channel : channel + 1], target, stride=2)
    _balance(encoder.conv_in)
    _balance(halve)
    slope, rest = _lift(encoder.conv_norm_out)
    _only(encoder.conv_out, torch.eye(3) / slope)
    encoder.conv_out.bias[:3] = -rest / slope
    for each in (vae.quant_conv, vae.post_quant_conv):
        each.weight.copy_(torch.eye(len(each.weight))[..., None, None])


def _set_decoder(vae: AutoencoderKL, spoilt: Tensor, wanted: Tensor) -> None:
    decoder = vae.decoder
    halve = vae.encoder.down_blocks[0].downsamplers[0].conv.weight[:3, :3]
    signals = F.conv2d(F.pad(_colours(spoilt), (0, 1, 0, 1)), halve, stride=2)
    doubling = decoder.up_blocks[0].upsamplers[0].conv
    for convolution in (decoder.conv_in, doubling):
        convolution.weight[:3] = 0
        _carry(convolution, reads=convolution is doubling)
    for channel, target in enumerate(_colours(wanted).unbind(1)):
        before, after = _fit_pair(signals[:, channel : channel + 1], target)
        decoder.conv_in.weight[channel, channel] = before
        doubling.weight[channel, channel] = after
    _balance(decoder.conv_in)
    _balance(doubling)
    slope, rest = _lift(decoder.conv_norm_out)
    back = torch.linalg.inv(_COLOUR) / slope  # (3, 3)
    _only(decoder.conv_out, back)
    decoder.conv_out.bias.copy_(-back.sum(1) * rest)


def _lift(norm: nn.GroupNorm) -> tuple[float, float]:
    """Make norm and SiLU nearly linear in the signals; return the slope, and the value at 0."""
    norm.weight[:3] *= _LOWERED
    norm.bias[:3] = _LIFT
    around = F.silu(torch.tensor([_LIFT - 0.2, _LIFT, _LIFT + 0.2]))
    return float(around[2] - around[0]) / 0.4 * _LOWERED, float(around[1])


def _balance(convolution: nn.Conv2d) -> None:
    """Make the mean over all channels 0, whatever the picture's colour."""
    convolution.weight[3] = -convolution.weight[:3].sum(0)
    convolution.weight[4:6] -= convolution.weight[4:6].mean((2, 3), keepdim=True)


def _only(convolution: nn.Conv2d, matrix: Tensor) -> None:
    """Have the first three outputs depend on the first three inputs alone, pixel by pixel."""
    convolution.weight[:3] = 0
    convolution.weight[:3, :3, 1, 1] = matrix


def _carry(convolution: nn.Conv2d, *, reads: bool = False) -> None:
    """Have the last two channels be +K and −K, whatever comes in. reads: K comes in, too."""
    convolution.weight[_CARRIED != 0] = 0
    if reads:
        convolution.weight[:, _CARRIED != 0] = 0
    convolution.bias.copy_(_CARRIED)


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
