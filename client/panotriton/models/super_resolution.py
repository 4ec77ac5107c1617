"""A one-step network's way from image to image: resize, encode, denoise in tiles, decode, align colours.

Its models are behind `call`, which sends tensors to one of them by name: other models of the server, or
graphs in this process (`panotriton.local`). Torch-free.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from panotriton.errors import InvalidImage, InvalidInput, quoted
from panotriton.models.colours import align_colours
from panotriton.models.one_step import OneStepNetwork, SizePlan, read_network
from panotriton.models.tags import Tags, tagger_input
from panotriton.models.tiles import TileBlend, Window, windows
from panotriton.pipeline.contract import MAX_PIXELS, MAX_SR_PIXELS, Options
from panotriton.pipeline.files import TOKENIZER
from panotriton.pipeline.networks import PIPELINE

__all__ = ["CallNetwork", "Limits", "Places", "SuperResolver", "run_all", "vae_tile"]

_AHEAD = 2  # images resized, or given their colours, while others are at the networks
_VAE_TILE_PX, _VAE_PAD_PX = 1024, 64
_VAE_TILES = 2  # of one image: the next waits at the network while one is blended
_PROMPTS = 64

T = TypeVar("T")
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


class CallNetwork(Protocol):
    """Runs the network `model` on `inputs`; returns the named `outputs`. May raise to end the work."""

    def __call__(
        self, model: str, inputs: dict[str, Any], outputs: Sequence[str]
    ) -> Awaitable[dict[str, NDArray[Any]]]: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds memory: each is a parameter of the model's config.pbtxt.

    images_in_flight: between encoder and decoder, of one `Places`; tiles_in_flight: of one image, sent and
    not yet back; vae_untiled_max_pixels: above it the VAE works in tiles of 1024 px with 64 px of
    context, which changes the result a little, since group norm then sees one tile at a time.
    """

    images_in_flight: int = 4
    tiles_in_flight: int = 16
    vae_untiled_max_pixels: int = 4_194_304


class Places:
    """How many images are where at once, so that the networks never wait for a processor.

    As many as `images_in_flight` are `at_networks`; two more are resized or given their colours meanwhile.
    In whole, `in_work`, that bounds memory however many images there are.
    """

    def __init__(self, limits: Limits) -> None:
        self.at_networks = asyncio.Semaphore(limits.images_in_flight)
        self.in_work = asyncio.Semaphore(limits.images_in_flight + _AHEAD)


class SuperResolver:
    """Images → super-resolved images. Not for several threads; for any number of coroutines.

    folder: with the settings and tokenizer.json that the network's export writes. tags: of its tagger,
    whose finds then precede every prompt; without, prompts are used as they are. Raises
    ServerStartError for a network that does not exist, and for settings that are not its.
    """

    def __init__(
        self, folder: Path, limits: Limits, tags: Tags | None = None, *, network: str = PIPELINE
    ) -> None:
        self.limits = limits
        self._network = read_network(folder, network)
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tags = tags
        self._embeds: dict[str, F32] = {}  # prompt → (1, L, D); the last 64

    @classmethod
    def of_model(cls, args: Mapping[str, str]) -> SuperResolver:
        """From what the server hands to a model's `initialize`; parameters of its config are the rest."""
        folder = Path(args["model_repository"]) / args["model_version"]
        parameters = json.loads(args["model_config"])["parameters"]
        values = {name: value["string_value"] for name, value in parameters.items()}
        limits = Limits(**{name: int(values[name]) for name in Limits.__slots__})
        return cls(folder, limits, Tags.read(folder), network=values["network"])

    @property
    def lacks_tagger(self) -> bool:
        """Whether the network could have a tagger, and none was exported."""
        return self._network.roles.tagger is not None and self._tags is None

    def warning(self, prompt: str) -> str:
        """Where the text encoder stops reading a prompt, in words; empty where it reads it all."""
        encoding = self._tokenizer.encode(prompt)
        if not encoding.overflowing:
            return ""
        end = max(stop for _, stop in encoding.offsets)
        return (
            f"PROMPT is read up to character {end} of {len(prompt)} and not from "
            f"{quoted(prompt[end:].strip())} on: the text encoder takes {len(encoding.ids)} tokens; "
            "shorten it, or put what matters first"
        )

    async def run(
        self,
        images: U8,
        call: CallNetwork,
        options: Options,
        warnings: list[str] | None = None,
        places: Places | None = None,
    ) -> U8:
        """Super-resolve images (N, h, w, 3) of one size → (N, H, W, 3) of upscale × that size.

        Of the options: upscale, align and prompt. warnings: gets one where a prompt, tags included, is
        longer than the text encoder reads; no more than one. places: shared with other calls; its own where
        left out. Raises InvalidInput for more pixels than a request may make, before they are allocated;
        else whatever `call` raises.
        """
        plan = self._network.plan(images.shape[1], images.shape[2], options.upscale)
        _check_amount(len(images), plan)
        if self._tags is None:  # one prompt: before images that would all find it missing
            await self._embed(options.prompt, call)
        where = places or Places(self.limits)
        results = np.empty((0, *plan.output, 3), np.uint8)

        async def work(index: int) -> None:
            nonlocal results
            async with where.in_work:
                if not len(results):  # only now: calls that wait for a place take no memory
                    results = np.empty((len(images), *plan.output, 3), np.uint8)
                source = await _prepared(plan, images[index])
                async with where.at_networks:
                    sharp = await self._through_networks(source, options, call, warnings)
                finish = (plan, sharp, source, options.align, results[index])
                await asyncio.to_thread(_finish, *finish)

        await run_all(work(index) for index in range(len(images)))
        return results

    async def _through_networks(
        self, source: U8, options: Options, call: CallNetwork, warnings: list[str] | None
    ) -> U8:
        """One image (H, W, 3) of the network's size → the same size, super-resolved."""
        prompt = await self._tagged(options.prompt, source, call)
        if warnings is not None and not warnings and (cut := self.warning(prompt)):
            warnings.append(cut)
        embeds = await self._embed(prompt, call)
        return await _OneImage(self._network, self.limits, call, embeds).run(source)

    async def _tagged(self, prompt: str, source: U8, call: CallNetwork) -> str:
        """The prompt of one image (H, W, 3): its tags and `prompt`. Triton joins what all images ask."""
        tagger = self._network.roles.tagger
        if self._tags is None or tagger is None:
            return prompt
        image = await asyncio.to_thread(tagger_input, source)
        result = await call(tagger, {"IMAGE": image[None]}, ["PROBABILITY"])
        return self._tags.prompt(result["PROBABILITY"][0], prompt)

    async def _embed(self, prompt: str, call: CallNetwork) -> F32:
        """The prompt's embedding (1, L, D), computed once per prompt."""
        if prompt not in self._embeds:
            ids = np.array([self._tokenizer.encode(prompt).ids], np.int64)  # (1, L)
            encoder = self._network.roles.text_encoder
            result = await call(encoder, {"INPUT_IDS": ids}, ["PROMPT_EMBEDS"])
            if len(self._embeds) >= _PROMPTS:
                self._embeds.pop(next(iter(self._embeds)))
            self._embeds[prompt] = result["PROMPT_EMBEDS"].copy()
        return self._embeds[prompt]


class _OneImage:
    """One image's way through encoder, denoiser and decoder."""

    def __init__(
        self, network: OneStepNetwork, limits: Limits, call: CallNetwork, embeds: F32
    ) -> None:
        self._network = network
        self._limits = limits
        self._call = call
        self._embeds = embeds  # (1, L, D)

    async def run(self, source: U8) -> U8:
        """One image (H, W, 3) of the network's size → the same size, super-resolved."""
        latent = await self._encode(source)  # (C, h, w)
        noise = await self._denoise(latent)  # (C, h, w)
        return await self._decode(self._network.step(latent, noise), source)

    async def _encode(self, source: U8) -> F32:
        tile, pad = _VAE_TILE_PX, _VAE_PAD_PX
        if source.shape[0] * source.shape[1] <= self._limits.vae_untiled_max_pixels:
            return await self._encode_tile(source)
        f = self._network.latent_px
        shape = (self._network.channels, source.shape[0] // f, source.shape[1] // f)
        latent = np.zeros(shape, np.float32)
        tiles = list(windows(shape[1], shape[2], tile // f, pad // f))
        sent = (self._encode_tile(source[_times(window.read, f)]) for window in tiles)
        async with aclosing(_in_order(sent, _VAE_TILES)) as parts:
            for window in tiles:
                latent[:, window.read[0], window.read[1]] += await anext(parts) * window.weights
        return latent

    async def _denoise(self, latent: F32) -> F32:
        channels, height, width = latent.shape
        tile = self._network.tile
        if height * width <= tile * tile:
            noise: F32 = (await self._predict_noise(latent[None]))[0]
            return noise
        blend = TileBlend((channels, height, width), tile, self._network.overlap)
        many = min(self._network.tiles_a_request, self._limits.tiles_in_flight)
        chunks = [blend.positions[i : i + many] for i in range(0, len(blend.positions), many)]
        sent = (self._predict_noise(blend.cut(latent, positions)) for positions in chunks)
        # In the order of the tiles, not of their arrival: sums then round alike every time.
        async with aclosing(_in_order(sent, -(-self._limits.tiles_in_flight // many))) as found:
            for positions in chunks:
                blend.add(await anext(found), positions)
        return blend.result()

    async def _decode(self, latent: F32, source: U8) -> U8:
        if source.shape[0] * source.shape[1] <= self._limits.vae_untiled_max_pixels:
            return await self._decode_tile(latent)
        f = self._network.latent_px
        image = np.zeros(source.shape, np.float32)
        tiles = list(windows(source.shape[0], source.shape[1], _VAE_TILE_PX, _VAE_PAD_PX))
        sent = (
            self._decode_tile(latent[(slice(None), *_over(window.read, f))]) for window in tiles
        )
        async with aclosing(_in_order(sent, _VAE_TILES)) as parts:
            for window in tiles:
                await asyncio.to_thread(_blend, image, source, await anext(parts), window)
        return np.asarray(image + np.float32(0.5), np.uint8)

    async def _encode_tile(self, pixels: U8) -> F32:
        encoder = self._network.roles.encoder
        result = await self._call(encoder, {"IMAGE": pixels[None]}, ["LATENT"])
        latent: F32 = result["LATENT"][0]  # (C, h, w)
        return latent

    async def _predict_noise(self, tiles: F32) -> F32:
        embeds = np.broadcast_to(self._embeds, (len(tiles), *self._embeds.shape[1:]))  # (T, L, D)
        inputs = {"LATENT": tiles, "PROMPT_EMBEDS": embeds}
        result = await self._call(self._network.roles.denoiser, inputs, ["NOISE"])
        return result["NOISE"]  # (T, C, h, w)

    async def _decode_tile(self, latent: F32) -> U8:
        decoder = self._network.roles.decoder
        result = await self._call(decoder, {"LATENT": latent[None]}, ["IMAGE"])
        image: U8 = result["IMAGE"][0]  # (H, W, 3)
        return image


def vae_tile(height: int, width: int, limits: Limits) -> tuple[int, int]:
    """What the VAE sees at once of an image of that size, in px: all of it, or a tile of it."""
    if height * width <= limits.vae_untiled_max_pixels:
        return height, width
    most = _VAE_TILE_PX + 2 * _VAE_PAD_PX
    return min(height, most), min(width, most)


async def _prepared(plan: SizePlan, image: U8) -> U8:
    """`plan.prepare` in threads, rows side by side where they can be made apart."""
    bands = plan.bands(image)
    if len(bands) == 1:
        return await asyncio.to_thread(plan.prepare, image)
    source = np.empty((*plan.network, 3), np.uint8)
    await run_all(asyncio.to_thread(plan.prepare_band, image, band, source[band]) for band in bands)
    return source


def _finish(plan: SizePlan, sharp: U8, source: U8, align: str, result: U8) -> None:
    """Colours and size of what the networks made, into `result`."""
    result[...] = plan.finish(align_colours(sharp, source, align))


def _blend(image: F32, source: U8, tile: U8, window: Window) -> None:
    """Add a decoded tile (h, w, 3) of an image to its window of `image`."""
    # Group norm over a tile instead of the image shifts its colours as a whole: take the shift back.
    aligned = align_colours(tile, source[window.read], "adain")
    image[window.read] += aligned * window.weights[..., None]


async def _in_order(
    work: Iterable[Coroutine[Any, Any, T]], at_once: int
) -> AsyncGenerator[T, None]:
    """Results in the order of the work, of which so much is begun before the first has been waited for."""
    sent: deque[asyncio.Task[T]] = deque()
    try:
        for item in work:
            sent.append(asyncio.ensure_future(item))
            if len(sent) >= at_once:
                yield await sent.popleft()
        while sent:
            yield await sent.popleft()
    finally:
        for task in sent:
            task.cancel()


def _over(spans: tuple[slice, slice], factor: int) -> tuple[slice, slice]:
    """Spans of pixels in latents."""
    y, x = (slice(span.start // factor, span.stop // factor) for span in spans)
    return y, x


def _times(spans: tuple[slice, slice], factor: int) -> tuple[slice, slice]:
    """Latent spans in pixels."""
    y, x = (slice(span.start * factor, span.stop * factor) for span in spans)
    return y, x


def _check_amount(count: int, plan: SizePlan) -> None:
    """Bound what a request makes the server allocate, before it does."""
    height, width = plan.network
    if height * width > MAX_PIXELS:
        raise InvalidImage(
            f"IMAGES would be super-resolved at {width}×{height} px; expected at most "
            f"{MAX_PIXELS / 1e6:.0f} megapixels: send smaller or less elongated images"
        )
    if count * height * width > MAX_SR_PIXELS:
        raise InvalidInput(
            f"IMAGES would make {count} images of {width}×{height} px; expected at most "
            f"{MAX_SR_PIXELS / 1e6:.0f} megapixels per request: send fewer at once"
        )


async def run_all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all; on the first failure stop the rest, so that no work outlives its request."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
