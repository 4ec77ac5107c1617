"""osediff: images → super-resolved images, through the exported networks of this repository."""

import asyncio
import json
from pathlib import Path

import cv2
import numpy as np
from tokenizers import Tokenizer

from panotriton import serving
from panotriton.errors import InvalidInput
from panotriton.images import MAX_PIXELS, check_images
from panotriton.osediff import TileBlend, align, check_options, one_step, plan_size, windows

_TILES_A_REQUEST = 4
_VAE_TILE_PX, _VAE_PAD_PX = 1024, 64


class TritonPythonModel:
    def initialize(self, args):
        cv2.setNumThreads(1)
        folder = Path(args["model_repository"]) / args["model_version"]
        self._settings = json.loads((folder / "osediff.json").read_text())
        self._factor = self._settings["vae_scale_factor"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._embeds = {}  # prompt → (1, 77, D); the last 64
        limits = json.loads(args["model_config"])["parameters"]
        self._images_in_flight = int(limits["images_in_flight"]["string_value"])
        self._tiles_in_flight = int(limits["tiles_in_flight"]["string_value"])
        self._vae_untiled_max_pixels = int(limits["vae_untiled_max_pixels"]["string_value"])

    async def execute(self, requests):
        return await serving.respond_async(requests, self._super_resolve)

    async def _super_resolve(self, request):
        images = serving.required(request, "IMAGES")
        check_images("IMAGES", images, min_side_px=8)
        upscale, method = _options(request)
        plan = plan_size(*images.shape[1:3], upscale, self._settings["process_size"])
        _check_amount(len(images), plan)
        embeds = await self._embed(serving.text(request, "PROMPT", ""))
        results = np.empty((len(images), *plan.output, 3), np.uint8)
        gate = asyncio.Semaphore(self._images_in_flight)

        async def work(index):
            async with gate:
                source = plan.prepare(images[index])
                sharp = await self._network(source, embeds)
                results[index] = plan.finish(align(sharp, source, method))

        await _all(work(index) for index in range(len(images)))
        return {"IMAGES_SR": results}

    async def _embed(self, prompt):
        """The prompt's embedding (1, 77, D), computed once a prompt."""
        if prompt not in self._embeds:
            ids = np.array([self._tokenizer.encode(prompt).ids], np.int64)  # (1, 77)
            result = await serving.call(
                "osediff_text_encoder", {"INPUT_IDS": ids}, ["PROMPT_EMBEDS"]
            )
            if len(self._embeds) >= 64:
                self._embeds.pop(next(iter(self._embeds)))
            self._embeds[prompt] = result["PROMPT_EMBEDS"].copy()
        return self._embeds[prompt]

    async def _network(self, source, embeds):
        """One image (H, W, 3), sides multiples of 8 → the same size, super-resolved."""
        latent = await self._encode(source)  # (C, h, w)
        noise = await self._denoise(latent, embeds)  # (C, h, w)
        return await self._decode(one_step(latent, noise, self._settings["alpha_cumprod"]))

    async def _encode(self, source):
        tile, pad = _VAE_TILE_PX, _VAE_PAD_PX
        if source.shape[0] * source.shape[1] <= self._vae_untiled_max_pixels:
            return (await _encode_tile(source))[0]
        f = self._factor
        shape = (self._settings["latent_channels"], source.shape[0] // f, source.shape[1] // f)
        latent = np.empty(shape, np.float32)
        for window in windows(shape[1], shape[2], tile // f, pad // f):
            pixels = tuple(slice(s.start * f, s.stop * f) for s in window.read)
            part = (await _encode_tile(source[pixels]))[0]
            latent[:, window.write[0], window.write[1]] = part[:, window.keep[0], window.keep[1]]
        return latent

    async def _denoise(self, latent, embeds):
        tile = self._settings["latent_tile"]
        if latent.shape[1] * latent.shape[2] <= tile * tile:
            return (await _predict_noise(latent[None], embeds))[0]
        blend = TileBlend(latent.shape, tile, self._settings["latent_overlap"])
        gate = asyncio.Semaphore(max(1, self._tiles_in_flight // _TILES_A_REQUEST))

        async def work(positions):
            async with gate:
                blend.add(await _predict_noise(blend.cut(latent, positions), embeds), positions)

        chunks = range(0, len(blend.positions), _TILES_A_REQUEST)
        await _all(work(blend.positions[i : i + _TILES_A_REQUEST]) for i in chunks)
        return blend.result()

    async def _decode(self, latent):
        f = self._factor
        height, width = latent.shape[1] * f, latent.shape[2] * f
        if height * width <= self._vae_untiled_max_pixels:
            return (await _decode_tile(latent))[0]
        image = np.empty((height, width, 3), np.uint8)
        for window in windows(*latent.shape[1:], _VAE_TILE_PX // f, _VAE_PAD_PX // f):
            part = (await _decode_tile(latent[:, window.read[0], window.read[1]]))[0]
            keep, write = (
                tuple(slice(s.start * f, s.stop * f) for s in spans)
                for spans in (window.keep, window.write)
            )
            image[write] = part[keep]
        return image


def _options(request):
    upscale = serving.number(request, "UPSCALE", 2)
    method = serving.text(request, "ALIGN", "adain")
    check_options(upscale, method)
    return upscale, method


def _check_amount(count, plan):
    """Bound what a request makes the server allocate, before it does."""
    height, width = plan.network
    if height * width > MAX_PIXELS:
        raise InvalidInput(
            f"IMAGES would be super-resolved at {width}×{height} px; expected at most "
            f"{MAX_PIXELS / 1e6:.0f} megapixels: send smaller or less elongated images"
        )
    if count * height * width > 4 * MAX_PIXELS:
        raise InvalidInput(
            f"IMAGES would make {count} images of {width}×{height} px; expected at most "
            f"{4 * MAX_PIXELS / 1e6:.0f} megapixels a request: send fewer at once"
        )


async def _encode_tile(pixels):
    result = await serving.call("osediff_vae_encoder", {"IMAGE": pixels[None]}, ["LATENT"])
    return result["LATENT"]  # (1, C, h, w)


async def _predict_noise(tiles, embeds):
    embeds = np.broadcast_to(embeds, (len(tiles), *embeds.shape[1:]))  # (T, 77, D)
    inputs = {"LATENT": tiles, "PROMPT_EMBEDS": embeds}
    return (await serving.call("osediff_unet", inputs, ["NOISE"]))["NOISE"]  # (T, C, h, w)


async def _decode_tile(latent):
    result = await serving.call("osediff_vae_decoder", {"LATENT": latent[None]}, ["IMAGE"])
    return result["IMAGE"]  # (1, H, W, 3)


async def _all(work):
    """Run all; on the first failure stop the rest, so that no work outlives its request."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
