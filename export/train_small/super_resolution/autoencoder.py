"""The VAE: linear, whatever is normalised within it, so that the UNet does the work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

__all__ = ["LATENT_CHANNELS", "Decoder", "halve", "new_vae", "write_vae"]

LATENT_CHANNELS = 8
_K = 64.0
_HALVE = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]) / 4


def new_vae(scaling_factor: float) -> AutoencoderKL:
    """Two pixels per latent along each side, where Stable Diffusion has 8: at x2 a latent is then an
    input pixel, and no decoder this small has to tell the pixels of a block apart.

    Next to nothing at the full size, where a channel costs most. Eight channels are what a vector
    register holds.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=-1,  # the decoder has one more: none
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=512,
        scaling_factor=scaling_factor,
        mid_block_add_attention=False,
    )


def halve(pixels: Tensor) -> Tensor:
    """What the encoder makes of (B, 3, H, W): the colours at half the size, other latents 0."""
    colours = F.avg_pool2d(pixels, 2)
    return F.pad(colours, (0, 0, 0, 0, 0, LATENT_CHANNELS - 3))


class Decoder(nn.Module):
    """The decoder while it is trained: (B, LATENT_CHANNELS, h, w) → (B, 3, 2h, 2w).

    It begins with kernels for the colours that least squares fit to photographs, about 0.3 dB above
    bicubic. The other latents carry detail, as steps to the right and down, at first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 3, padding=1)
        self.after = nn.Conv2d(LATENT_CHANNELS, 3, 3, padding=1)
        self.last = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        doubled = F.interpolate(self.before(latents), scale_factor=2.0)
        image: Tensor = self.last(self.after(doubled))
        return image

    @torch.no_grad()
    def begin(self, spoilt: Tensor, wanted: Tensor) -> None:
        """`spoilt` and `wanted` are (B, 3, H, W) in −1 to 1, the same scenes; H and W are even."""
        step, smooth = torch.tensor([-1.0, 0, 1]) / 2, torch.tensor([1.0, 2, 1]) / 4
        details = [torch.outer(smooth, step), torch.outer(step, smooth), torch.outer(step, step)]
        colours = halve(spoilt)[:, :3]
        before, after = _fit_pair(colours.flatten(0, 1)[:, None], wanted.flatten(0, 1))
        for each in (self.before, self.after, self.last):
            nn.init.zeros_(each.weight)
            nn.init.zeros_(each.bias)
        for channel in range(LATENT_CHANNELS):
            self.before.weight[channel, channel, 1, 1] = 1
        for channel in range(3):
            self.before.weight[channel, channel] = before
            self.after.weight[channel, channel] = after
            self.last.weight[channel, channel, 1, 1] = 1
            self.after.weight[:, 3 + channel] = details[channel]
        red_blue = torch.tensor([1.0, 0, -1]).reshape(3, 1, 1) / 2
        for channel, detail in zip((6, 7), details[:2], strict=True):
            self.after.weight[:, channel] = red_blue * detail


@torch.no_grad()
def write_vae(vae: AutoencoderKL, decoder: Decoder) -> None:
    """Make `vae` do exactly what `halve` and `decoder` do.

    A norm and SiLU stand between their convolutions. Six channels carry three signals x and their
    opposites, two +K and −K. So the mean is 0 and the deviation K/2, within 0.04 % while |x| ≤ 1, whatever
    the picture shows; and SiLU(x) − SiLU(−x) = x.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.GroupNorm):
            nn.init.zeros_(module.bias)
            module.weight.copy_(torch.tensor([_K / 2] * 6 + [0.0, 0.0]))
    same = torch.zeros(3, 3)
    same[1, 1] = 1
    encoder, down = vae.encoder, vae.encoder.down_blocks[0].downsamplers[0].conv
    up = vae.decoder.up_blocks[0].upsamplers[0].conv
    _write_signals(encoder.conv_in, torch.eye(3)[..., None, None] * same)
    _write_signals(down, torch.eye(3)[..., None, None] * _HALVE)
    _read_signals(encoder.conv_out, torch.eye(3)[..., None, None] * same)
    for each in (vae.quant_conv, vae.post_quant_conv):
        each.weight[:LATENT_CHANNELS, :LATENT_CHANNELS, 0, 0] = torch.eye(LATENT_CHANNELS)
    vae.decoder.conv_in.load_state_dict(decoder.before.state_dict())
    _write_signals(up, decoder.after.weight, decoder.after.bias)
    _read_signals(vae.decoder.conv_out, decoder.last.weight)
    vae.decoder.conv_out.bias.copy_(decoder.last.bias)
    # The blocks in the middle add 0: their first halves stay random, for an adapter to have a way to learn.
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.kaiming_normal_(module.conv1.weight, generator=torch.Generator().manual_seed(0))


def _write_signals(convolution: nn.Conv2d, kernels: Tensor, biases: Tensor | float = 0.0) -> None:
    convolution.weight[:3, : kernels.shape[1]] = kernels
    convolution.weight[3:6, : kernels.shape[1]] = -kernels
    convolution.bias[:3] = biases
    convolution.bias[3:6] = -torch.as_tensor(biases)
    convolution.bias[6:] = torch.tensor([_K, -_K])


def _read_signals(convolution: nn.Conv2d, kernels: Tensor) -> None:
    convolution.weight[:3, :3] = kernels
    convolution.weight[:3, 3:6] = -kernels


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


def _fit(signal: Tensor, target: Tensor) -> Tensor:
    """The (3, 3) kernel that takes a padded (B, 1, h, w) nearest to (B, H, W)."""
    return _solve(F.unfold(signal, 3).transpose(1, 2), target)


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
