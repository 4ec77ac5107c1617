"""panorama_stream: the pipeline as events, through the other models of this repository."""

import asyncio
import contextlib
import json
import math

import cv2
import numpy as np
import triton_python_backend_utils as pb_utils

from panotriton.errors import InvalidInput, ServerBusy
from panotriton.models.panoramas import read_cameras, read_panorama
from panotriton.models.requests import (
    Cancelled,
    answers,
    calls_until,
    read_options,
    strings,
)
from panotriton.models.super_resolution import Places, SuperResolver, run_all
from panotriton.pipeline.contract import INTERVALS
from panotriton.pipeline.quality import filter_intervals, finite_or_none

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        cv2.setNumThreads(1)
        # Not the model `osediff`: a cancel does not reach requests that one model has sent to another, and
        # here it must stop an image between two tiles.
        self._resolver = SuperResolver.of_model(args)
        parameters = json.loads(args["model_config"])["parameters"]
        self._most = self._places = int(parameters["max_groups"]["string_value"])

    async def execute(self, requests):
        await asyncio.gather(*map(self._answer, requests))

    async def _answer(self, request):
        sender = request.get_response_sender()
        run = _Run(request, sender, self._resolver)
        try:
            with self._place():
                await run.run()
        except Cancelled:
            pass  # nobody is left to tell
        except ServerBusy as error:
            run.end("busy", error)
        except InvalidInput as error:
            run.end("refused", error)
        except Exception as error:
            answers([error])  # logs what is unexpected
            run.end("failed", error)
        run.close()

    @contextlib.contextmanager
    def _place(self):
        if not self._places:
            raise ServerBusy(
                f"{self._most} groups are in work, as many as max_groups; try again later"
            )
        self._places -= 1
        try:
            yield
        finally:
            self._places += 1


class _Run:
    """One request on its way through the pipeline."""

    def __init__(self, request, sender, resolver):
        self._request = request
        self._sender = sender
        self._resolver = resolver
        self._call = calls_until(sender.is_cancelled)
        self._places = Places(resolver.limits)
        self._done, self._total = 0, 0
        self._warnings, self._warned = [], False

    async def run(self):
        self._options = read_options(self._request).completed()
        self._sizes = {
            "CROP_SIZE": np.array([self._options.crop_size], np.int32),
            "SPHERE_SIZE": np.array([self._options.sphere_size], np.int32),
        }
        cameras, panoramas = read_cameras(self._request), await _panoramas(self._request)
        self._total = 2 * INTERVALS * (1 + self._options.interpolations)
        self._send("accepted")
        inputs = {f"PANORAMA_{i}": image for i, image in enumerate(panoramas, start=1)}
        inputs |= self._sizes | {"GIVEN_CAMERAS": cameras}
        made = await self._call("preprocess", inputs, ["PAIRS", "SPHERE_1", "SPHERE_2"])
        self._cameras = cameras
        self._pairs = made["PAIRS"]
        self._spheres = {"SPHERE_1": made["SPHERE_1"], "SPHERE_2": made["SPHERE_2"]}
        self._send("cameras", cameras=cameras.reshape(-1, 5))
        kept = await run_all(self._interval(number) for number in range(1, INTERVALS + 1))
        kept = [number for number in kept if number]
        self._send("done", kept=kept, warning="".join(self._warnings))

    def end(self, event, error):
        # An event, not an error: those carry no status code in a stream, and where a client asks for
        # one ("triton_grpc_error"), the server of 24.10 crashes.
        with contextlib.suppress(Cancelled):
            self._send(event, message=str(error))

    def close(self):
        self._sender.send(flags=_FINAL)

    async def _interval(self, number):
        """One interval; returns its number where it is kept."""
        scores = np.full((2, INTERVALS), math.nan, np.float32)
        for p in range(2):
            sharp = await self._sharpen(self._pairs[p * INTERVALS + number - 1])
            self._send("pair", images=sharp, panorama=p + 1, interval=number)
            scores[p, number - 1] = await self._score(sharp, p + 1, number)
            if scores[p, number - 1] < np.float32(
                self._options.threshold
            ):  # false for NaN, "no score"
                self._drop(number, p, f"panorama {p + 1} scores {scores[p, number - 1]:.2f}")
                return None
        if not len(filter_intervals(scores.reshape(-1), self._options.threshold)):
            self._drop(number, 1, "neither pair has a score")
            return None
        self._send("kept", interval=number)
        right = np.ascontiguousarray(
            sharp[:, :, sharp.shape[2] // 2 :]
        )  # (1, H, W, 3), panorama 2's
        await run_all([self._views(number), self._describe(right, number)])
        return number

    async def _score(self, sharp, panorama, number):
        outputs = ["SCORE", "SUB_SCORES", "RAW_OUTPUT"]
        got = await self._call("qwen_scorer", {"IMAGES": sharp}, outputs)
        values = [float(value) for value in (*got["SUB_SCORES"][0], got["SCORE"][0])]
        self._send(
            "scored",
            panorama=panorama,
            interval=number,
            scores=[finite_or_none(value) for value in values],
            raw_reply=got["RAW_OUTPUT"][0].decode(),
        )
        return got["SCORE"][0]

    def _drop(self, number, p, reason):
        self._total -= 2 * self._options.interpolations + 1 - p
        self._send("dropped", interval=number, reason=reason)

    async def _views(self, number):
        inputs = {
            **self._spheres,
            **self._sizes,
            "CAMERAS": self._cameras,
            "KEPT": np.array([number], np.int32),
            "NUM_INTERPOLATIONS": np.array([self._options.interpolations], np.int32),
        }
        got = await self._call("interpolate", inputs, ["INTERPOLATED", "INTERPOLATED_CAMERAS"])
        cameras = got["INTERPOLATED_CAMERAS"].reshape(-1, 5)  # (2·N, 5)
        work = (
            self._view(crop, camera, number, *divmod(index, self._options.interpolations))
            for index, (crop, camera) in enumerate(zip(got["INTERPOLATED"], cameras, strict=True))
        )
        await run_all(work)

    async def _view(self, crop, camera, number, p, i):
        place = {"panorama": p + 1, "interval": number, "weight_idx": i + 1}
        self._send("view", images=await self._sharpen(crop), cameras=camera[None], **place)

    async def _describe(self, right, number):
        outputs = ["DESCRIPTION", "DESCRIPTION_ERROR"]
        got = await self._call("qwen_describer", {"IMAGES": right}, outputs)
        text, error = (got[name][0].decode() for name in outputs)
        self._send("described", interval=number, text=text, error=error)

    async def _sharpen(self, image):
        """(h, w, 3) → (1, H, W, 3)."""
        work = (image[None], self._call, self._options, self._warnings, self._places)
        sharp = await self._resolver.run(*work)
        if self._warnings and not self._warned:
            self._warned = True
            pb_utils.Logger.log_warn(f"panorama_stream: {self._warnings[0]}")
        self._done += 1
        return sharp

    def _send(self, event, images=None, cameras=None, **content):
        if self._sender.is_cancelled():
            raise Cancelled
        content |= {"event": event, "done": self._done, "total": self._total}
        tensors = {
            "EVENT": strings([json.dumps(content)]),
            "IMAGES": images,
            "CAMERAS": cameras,
        }
        self._sender.send(
            pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, value)
                    for name, value in tensors.items()
                    if value is not None
                ]
            )
        )


async def _panoramas(request):
    """Both panoramas, (H, W, 3); files are decoded side by side."""
    read = (asyncio.to_thread(read_panorama, request, suffix) for suffix in ("_1", "_2"))
    return await asyncio.gather(*read)
