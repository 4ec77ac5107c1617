"""qwen: images and a system prompt → replies, or numbers read directly, of a Qwen-VL model.

The images of all requests of one execute call that ask the same are worked on together. The engine
is the export's choice: PyTorch in this process, or Triton's vLLM backend as the model `qwen_vllm`.
"""

import asyncio
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from panotriton.errors import InferenceFailed, InvalidInput, quoted
from panotriton.models import qwen_vllm
from panotriton.models.imports import uncollected
from panotriton.models.requests import (
    answers,
    attempt,
    execute,
    failed,
    request_to,
    required,
    strings,
    text,
)
from panotriton.pipeline.checks import check_images
from panotriton.pipeline.contract import MAX_NEW_TOKENS, MAX_QWEN_ASPECT, MIN_QWEN_SIDE_PX
from panotriton.pipeline.files import settings_file
from panotriton.pipeline.quality import MODES

# Of Qwen-VL's vocabularies: a prompt of theirs would end its own turn, or stand for an image.
_SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>"),
)
_QUESTION = ("SYSTEM_PROMPT", "READING", "STOP_AFTER", "MAX_NEW_TOKENS")


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / settings_file("qwen")).read_text())
        self._across_requests = _flag(args, "batch_across_requests")
        engine = {"torch": _Torch, "vllm": _Vllm}[settings["engine"]]
        self._engine = engine(folder, settings, args)

    async def execute(self, requests):
        asked = [attempt(_read, request) for request in requests]
        together = defaultdict(list)  # indices of the requests that are worked on at once
        for index, request in enumerate(asked):
            if not isinstance(request, Exception):
                together[request[1], None if self._across_requests else index].append(index)
        outcomes = await asyncio.gather(
            *(
                self._answers([asked[i][0] for i in indices], question)
                for (question, _), indices in together.items()
            )
        )
        results = list(asked)
        for indices, found in zip(together.values(), outcomes, strict=True):
            for index, outcome in zip(indices, found, strict=True):
                results[index] = outcome
        return answers([_tensors(result) for result in results])

    async def _answers(self, requests, question):
        """For each request (text, value) per image, or why there is none: that may be one request's fault."""
        try:
            found = iter(
                await self._engine.answer([i for images in requests for i in images], *question)
            )
            return [[next(found) for _ in images] for images in requests]
        except Exception as error:  # whatever an engine raises, also for want of memory
            if len(requests) == 1:
                return [error]
        return [(await self._answers([images], question))[0] for images in requests]


class _Torch:
    """The weights in this process; its one event loop waits while they work."""

    def __init__(self, folder, settings, args):
        with uncollected():
            from panotriton.models.qwen import FixedVision, QwenVL  # noqa: PLC0415 gigabytes: torch

        limits = json.loads(args["model_config"])["parameters"]
        on_gpu = args["model_instance_kind"] == "GPU"
        grid = settings["vision_grid"]
        self._qwen = QwenVL(
            folder / settings["weights"],  # an absolute path stands for itself
            dtype=settings["dtype"],
            device=f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu",
            max_batch=int(limits["max_batch_images"]["string_value"]),
            max_pixels=settings["max_pixels"],
            memory_fraction=float(limits["gpu_memory_fraction"]["string_value"]),
            vision=FixedVision(tuple(grid), _see) if grid else None,
            decode=settings.get("decode", "dynamic"),
        )

    async def answer(self, images, prompt, reading, stop_after, max_new_tokens):
        """(text, value) per image: the one that was asked for, and nothing or NaN for the other."""
        if reading == "number":
            return [("", value) for value in self._qwen.read_number(images, prompt)]
        if reading == "levels":
            return [("", value) for value in self._qwen.read_level(images, prompt)]
        replies = self._qwen.reply(images, prompt, max_new_tokens, stop_after)
        return [(reply, np.nan) for reply in replies]


def _see(patches):
    """Image tokens (n, tokens, hidden) of qwen_vision for (n, patches, values) fp32."""
    response = request_to("qwen_vision", {"PATCHES": patches}, ["TOKENS"]).exec()
    if response.has_error():
        raise failed("qwen_vision", response.error().message())
    return pb_utils.get_output_tensor_by_name(response, "TOKENS").as_numpy()


class _Vllm:
    """The weights in the vLLM backend, asked through the server, image by image, all at once."""

    def __init__(self, folder, settings, args):
        self._chat = qwen_vllm.Chat(settings["before"], settings["after"], settings["sampling"])

    async def answer(self, images, prompt, reading, stop_after, max_new_tokens):
        questions = qwen_vllm.questions(self._chat, prompt, reading, max_new_tokens)
        pngs = [qwen_vllm.encode(image) for image in images]
        asked = (self._ask(question, png) for png in pngs for question in questions)
        replies = await asyncio.gather(*asked)
        each = (replies[i : i + len(questions)] for i in range(0, len(replies), len(questions)))
        return [qwen_vllm.answer(reading, few, stop_after) for few in each]

    async def _ask(self, question, png):
        """text_output, or logprobs' JSON. The backend is decoupled and here answers once."""
        output = "logprobs" if question.next_token else "text_output"
        inputs = qwen_vllm.tensors(question, png, self._chat)
        request = request_to("qwen_vllm", inputs, [output])
        for response in await execute(request, decoupled=True):
            if response.has_error():
                raise failed("qwen_vllm", response.error().message())
            tensor = pb_utils.get_output_tensor_by_name(response, output)
            if tensor is not None:  # an empty response may only say that it was the last
                return tensor.as_numpy().item()
        raise InferenceFailed(f"qwen_vllm answered without {output}")


def _flag(args, name):
    value = json.loads(args["model_config"])["parameters"][name]["string_value"]
    if value not in ("true", "false"):
        raise InvalidInput(f"{name} in config.pbtxt is {quoted(value)}; expected true or false")
    return value == "true"


def _read(request):
    """A request's images, and its question as values that can be compared."""
    images = required(request, "IMAGE")  # (N, H, W, 3)
    check_images("IMAGE", images, MIN_QWEN_SIDE_PX, MAX_QWEN_ASPECT)
    question = [set(required(request, name).flat) for name in _QUESTION]
    for name, values in zip(_QUESTION, question, strict=True):
        if len(values) != 1:
            raise InvalidInput(
                f"{name} differs between the images of one request; send one per request"
            )
    prompt, reading, stop_after, limit = (value for (value,) in question)
    prompt, stop_after = text("SYSTEM_PROMPT", prompt), text("STOP_AFTER", stop_after)
    if special := next((each for each in _SPECIAL if each in prompt), None):
        raise InvalidInput(
            f"SYSTEM_PROMPT holds {special}, a token of the chat itself; leave it out"
        )
    if reading not in {each.encode() for each in MODES.values()}:
        raise InvalidInput(
            f"READING is {quoted(reading)}; expected one of {', '.join(MODES.values())}"
        )
    if not 1 <= limit <= MAX_NEW_TOKENS:
        raise InvalidInput(f"MAX_NEW_TOKENS is {limit}; expected 1 to {MAX_NEW_TOKENS}")
    return list(images), (prompt, reading.decode(), stop_after, int(limit))


def _tensors(result):
    if isinstance(result, BaseException):
        return result
    texts, values = zip(*result, strict=True)
    values = np.array(values, np.float32)
    return {"TEXT": strings(texts)[:, None], "VALUE": values[:, None]}  # (N, 1) each
