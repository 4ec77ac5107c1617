"""The super-resolution networks: which models of the repository play which roles."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NETWORKS", "OSEDIFF", "PIPELINE", "Roles", "fronts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The models that play the roles of a one-step super-resolution network, by their names.

    text_encoder: INPUT_IDS int64 (B, L) → PROMPT_EMBEDS fp32 (B, L, D)
    encoder: IMAGE uint8 (B, H, W, 3) RGB → LATENT fp32 (B, C, h, w)
    denoiser: LATENT (B, C, h, w), PROMPT_EMBEDS (B, L, D) → NOISE fp32 (B, C, h, w)
    decoder: LATENT (B, C, h, w) → IMAGE uint8 (B, H, W, 3) RGB
    tagger, None where the network never has one: IMAGE uint8 (B, 384, 384, 3) RGB →
    PROBABILITY fp32 (B, T). It need not be exported.
    """

    text_encoder: str
    encoder: str
    denoiser: str
    decoder: str
    tagger: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """All that must be exported, in the order of the work."""
        return (self.text_encoder, self.encoder, self.denoiser, self.decoder)

    @property
    def models(self) -> tuple[str, ...]:
        """All, in the order of the work."""
        return (*((self.tagger,) if self.tagger else ()), *self.required)


OSEDIFF = Roles(
    text_encoder="osediff_text_encoder",
    encoder="osediff_vae_encoder",
    denoiser="osediff_unet",
    decoder="osediff_vae_decoder",
    tagger="osediff_tagger",
)
# By the name of the model that runs the network.
NETWORKS = {"osediff": OSEDIFF}
# The one that the configs of the ensembles and of panorama_stream name.
PIPELINE = "osediff"


def fronts(network: str) -> tuple[str, ...]:
    """The models that run a network's arithmetic and so hold its files."""
    return (network, "panorama_stream") if network == PIPELINE else (network,)
