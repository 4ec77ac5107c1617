"""All parts as the pipeline joins them: encoder, one step, decoder."""

from __future__ import annotations

import math

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from panotriton_export.train_small.super_resolution.autoencoder import LATENT_CHANNELS, new_vae
from panotriton_export.train_small.super_resolution.text import new_text_encoder, new_tokenizer
from panotriton_export.train_small.super_resolution.unet import new_unet

__all__ = ["SmallOsediff"]


def one_step(scheduler: DDPMScheduler) -> tuple[float, float]:
    """(1/√ᾱ, √(1−ᾱ)/√ᾱ) at t = 999: x0 = first · z − second · ε."""
    alpha_bar = float(scheduler.alphas_cumprod[999])
    return 1 / math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar) / math.sqrt(alpha_bar)


def new_scheduler() -> DDPMScheduler:
    """Stable Diffusion 2.1-base's."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="epsilon",
        steps_offset=1,
    )


class SmallOsediff(nn.Module):
    """Pixels (B, 3, H, W) in −1 to 1 → the same shape, unclamped. H and W are multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = new_scheduler()
        gain, self.scaling_factor = one_step(self.scheduler)
        self.gain = gain / self.scaling_factor  # 1.0023
        self.vae = new_vae(self.scaling_factor)
        self.unet = new_unet()
        self.tokenizer = new_tokenizer()
        self.text_encoder = new_text_encoder(self.tokenizer)

    def forward(self, pixels: Tensor, prompt: Tensor) -> Tensor:
        z = self.vae.quant_conv(self.vae.encoder(pixels))[:, :LATENT_CHANNELS]  # (B, 4, h, w)
        epsilon = self.unet(z, 999, prompt).sample
        image: Tensor = self.vae.decoder(self.vae.post_quant_conv(self.gain * z - epsilon))
        return image

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """(prompts, 77, PROMPT_WIDTH)."""
        ids = self.tokenizer(
            prompts, max_length=77, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        embeddings: Tensor = self.text_encoder(ids).last_hidden_state
        return embeddings
