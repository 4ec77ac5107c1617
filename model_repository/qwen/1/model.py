"""qwen: images and a system prompt → greedy replies of a Qwen-VL model, in left-padded batches.

The images of all requests of one execute call that share a prompt are generated together.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from panotriton import serving
from panotriton.errors import InvalidInput
from panotriton.images import check_images

_MAX_NEW_TOKENS = 2048
_MIN_SIDE_PX = 28  # one merged patch


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / "qwen.json").read_text())
        weights = folder / settings["weights"]  # an absolute path stands for itself
        on_gpu = args["model_instance_kind"] == "GPU"
        self._device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
        self._processor = AutoProcessor.from_pretrained(weights, trust_remote_code=False)
        self._processor.tokenizer.padding_side = "left"
        model = AutoModelForImageTextToText.from_pretrained(
            weights, dtype=settings["dtype"], trust_remote_code=False, use_safetensors=True
        )
        self._model = model.to(self._device).eval()
        limits = json.loads(args["model_config"])["parameters"]
        self._max_batch = int(limits["max_batch_images"]["string_value"])

    def execute(self, requests):
        asked = [serving.attempt(_read, request) for request in requests]
        together = defaultdict(list)  # (prompt, max_new_tokens) → indices of requests
        for index, question in enumerate(asked):
            if not isinstance(question, Exception):
                together[question[1:]].append(index)
        answers = list(asked)
        for options, indices in together.items():
            images = [image for index in indices for image in asked[index][0]]
            replies = serving.attempt(self._reply, images, *options)
            for index in indices:
                count = len(asked[index][0])
                answers[index] = replies
                if not isinstance(replies, Exception):
                    answers[index] = {"TEXT": serving.texts(replies[:count])[:, None]}  # (N, 1)
                    replies = replies[count:]
        return serving.answers(answers)

    def _reply(self, images, prompt, max_new_tokens):
        # Similar sizes side by side: less padding.
        order = sorted(range(len(images)), key=lambda index: images[index].size)
        replies = [""] * len(images)
        for start in range(0, len(order), self._max_batch):
            batch = order[start : start + self._max_batch]
            texts = self._generate([images[index] for index in batch], prompt, max_new_tokens)
            for index, text in zip(batch, texts, strict=True):
                replies[index] = text
        return replies

    @torch.inference_mode()
    def _generate(self, images, prompt, max_new_tokens):
        inputs = self._inputs(images, prompt)
        tokens = self._model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]  # (B, ≤ max_new_tokens)
        return self._processor.batch_decode(new, skip_special_tokens=True)

    def _inputs(self, images, prompt):
        """Processor inputs of (H, W, 3) uint8 arrays; pixels stay tensors all the way."""
        turns = [
            {"role": "system", "content": prompt},
            {"role": "user", "content": [{"type": "image"}]},
        ]
        chat = self._processor.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        pixels = [torch.from_numpy(image).permute(2, 0, 1) for image in images]  # (3, H, W)
        inputs = self._processor(
            images=pixels, text=[chat] * len(images), padding=True, return_tensors="pt"
        )
        return inputs.to(self._device)


def _read(request):
    """A request's images, prompt and token limit."""
    images = serving.required(request, "IMAGE")  # (N, H, W, 3)
    check_images("IMAGE", images, min_side_px=_MIN_SIDE_PX)
    prompts = {
        value.decode(errors="replace") for value in serving.required(request, "SYSTEM_PROMPT").flat
    }
    limits = set(serving.required(request, "MAX_NEW_TOKENS").flat)
    if len(prompts) > 1 or len(limits) > 1:
        raise InvalidInput("SYSTEM_PROMPT and MAX_NEW_TOKENS must be the same for all of a request")
    (prompt,), (limit,) = prompts, limits
    if not 1 <= limit <= _MAX_NEW_TOKENS:
        raise InvalidInput(f"MAX_NEW_TOKENS is {limit}; expected 1 to {_MAX_NEW_TOKENS}")
    return list(np.array(images)), prompt, int(limit)
