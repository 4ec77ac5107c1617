"""qwen: images and a system prompt → greedy replies of a Qwen-VL model, in left-padded batches."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from panotriton import serving
from panotriton.errors import InvalidInput
from panotriton.images import check_images

_MAX_NEW_TOKENS = 2048


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
        return serving.respond(requests, self._reply)

    def _reply(self, request):
        images = serving.required(request, "IMAGES")
        check_images("IMAGES", images, min_side_px=28)
        prompt = serving.text(request, "SYSTEM_PROMPT", "")
        max_new_tokens = serving.number(request, "MAX_NEW_TOKENS", 0)
        if not 1 <= max_new_tokens <= _MAX_NEW_TOKENS:
            raise InvalidInput(
                f"MAX_NEW_TOKENS is {max_new_tokens}; expected 1 to {_MAX_NEW_TOKENS}"
            )
        replies = []
        for start in range(0, len(images), self._max_batch):
            batch = images[start : start + self._max_batch]
            replies += self._generate(batch, prompt, max_new_tokens)
        return {"TEXT": serving.texts(replies)}

    @torch.inference_mode()
    def _generate(self, images, prompt, max_new_tokens):
        inputs = self._inputs(images, prompt)
        tokens = self._model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]  # (B, ≤ max_new_tokens)
        return self._processor.batch_decode(new, skip_special_tokens=True)

    def _inputs(self, images, prompt):
        """Processor inputs of a batch (B, H, W, 3) uint8; pixels stay tensors all the way."""
        turns = [
            {"role": "system", "content": prompt},
            {"role": "user", "content": [{"type": "image"}]},
        ]
        chat = self._processor.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # (B, 3, H, W)
        inputs = self._processor(
            images=list(pixels), text=[chat] * len(images), padding=True, return_tensors="pt"
        )
        return inputs.to(self._device)
