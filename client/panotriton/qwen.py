"""A Qwen-VL model that answers about images in batches: whole replies, or one number read directly.

Imports torch and transformers: for the server's `qwen` model and for use without a server.

Readings. `text` decodes greedily. `number` and `levels` decode nothing: the reply's skeleton is
teacher-forced and the answer is the expectation over the next token, in one forward pass.

- number: after "Final Score: 0." the ten digits, and one position back 0 against 1:
  E = P(1) + P(0) · (Σ d/10 · P(d) + 0.045); 0.045 is the mean of a second decimal.
- levels: after "The quality of the pair is" five words, weighted 1, 0.75, 0.5, 0.25, 0 as in
  "Q-Align: Teaching LMMs for Visual Scoring via Discrete Text-Defined Levels", Wu et al., ICML 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from panotriton.errors import InvalidInput

__all__ = ["MIN_SIDE_PX", "READINGS", "QwenVL"]

READINGS = ("text", "number", "levels")
MIN_SIDE_PX = 28  # one merged patch

_NUMBER_SKELETON = "Final Score: 0."
_SECOND_DECIMAL = 0.045
_LEVEL_SKELETON = "The quality of the pair is"
_LEVELS = {" excellent": 1.0, " good": 0.75, " fair": 0.5, " poor": 0.25, " bad": 0.0}

Image = NDArray[np.uint8]


class QwenVL:
    """The weights of one Hugging Face folder on one device; no code of the folder is run.

    max_batch bounds how many images are worked on at once, and with the processor's max_pixels the
    memory. max_pixels of None leaves the folder's own bound. dtype is "auto", "bfloat16", "float16"
    or "float32".
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        max_batch: int = 16,
        max_pixels: int | None = None,
    ) -> None:
        self.device = device
        self.max_batch = max_batch
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        self.processor.tokenizer.padding_side = "left"
        if max_pixels is not None:
            self.processor.image_processor.size["longest_edge"] = max_pixels
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        self.model = model.to(device).eval()

    def reply(
        self, images: Sequence[Image], prompt: str, max_new_tokens: int, stop_after: str = ""
    ) -> list[str]:
        """Greedy replies to (H, W, 3) uint8 images of any sizes, without special tokens.

        A reply ends early once a line that starts with `stop_after`, in any case, is complete.
        """
        return self._batched(
            images, lambda part: self._reply(part, prompt, max_new_tokens, stop_after)
        )

    def read_number(self, images: Sequence[Image], prompt: str) -> list[float]:
        """The final score that the model expects, 0 to 1, one an image."""
        return self._batched(images, lambda part: self._read_number(part, prompt))

    def read_level(self, images: Sequence[Image], prompt: str) -> list[float]:
        """The expected level of quality, 0 (bad) to 1 (excellent), one an image."""
        return self._batched(images, lambda part: self._read_level(part, prompt))

    def _batched(
        self, images: Sequence[Image], work: Callable[[list[Image]], list[Any]]
    ) -> list[Any]:
        # Similar sizes side by side: less padding.
        order = sorted(range(len(images)), key=lambda index: images[index].size)
        results: list[Any] = [None] * len(images)
        for start in range(0, len(order), self.max_batch):
            part = order[start : start + self.max_batch]
            for index, result in zip(part, work([images[i] for i in part]), strict=True):
                results[index] = result
        return results

    @torch.inference_mode()
    def _reply(self, images: list[Image], prompt: str, limit: int, stop_after: str) -> list[str]:
        inputs = self._inputs(images, prompt)
        length = inputs["input_ids"].shape[1]
        stop = StoppingCriteriaList()
        if stop_after:
            stop.append(_LineComplete(self.processor, length, stop_after))
        tokens = self.model.generate(
            **inputs, max_new_tokens=limit, do_sample=False, stopping_criteria=stop
        )
        replies: list[str] = self.processor.batch_decode(
            tokens[:, length:], skip_special_tokens=True
        )
        return replies

    def _read_number(self, images: list[Image], prompt: str) -> list[float]:
        logits = self._skeleton_logits(images, prompt, _NUMBER_SKELETON, keep=3)  # (B, 3, V)
        digits = self._single_tokens([str(digit) for digit in range(10)])
        units = logits[:, 0, digits[:2]].softmax(-1)  # (B, 2): P(0), P(1) before the point
        decimals = logits[:, 2, digits].softmax(-1)  # (B, 10): after it
        tenths = torch.arange(10, device=logits.device) / 10
        below_one = (decimals * tenths).sum(-1) + _SECOND_DECIMAL
        return [float(value) for value in units[:, 1] + units[:, 0] * below_one]

    def _read_level(self, images: list[Image], prompt: str) -> list[float]:
        logits = self._skeleton_logits(images, prompt, _LEVEL_SKELETON, keep=1)  # (B, 1, V)
        levels = logits[:, 0, self._first_tokens(list(_LEVELS))].softmax(-1)  # (B, 5)
        weights = torch.tensor(list(_LEVELS.values()), device=logits.device)
        return [float(value) for value in (levels * weights).sum(-1)]

    @torch.inference_mode()
    def _skeleton_logits(
        self, images: list[Image], prompt: str, skeleton: str, keep: int
    ) -> Tensor:
        """fp32 logits (B, keep, V) of the last positions once the reply has begun with `skeleton`."""
        inputs = self._inputs(images, prompt, skeleton)
        logits: Tensor = self.model(**inputs, logits_to_keep=keep, use_cache=False).logits
        return logits.float()

    def _inputs(self, images: list[Image], prompt: str, reply: str = "") -> Any:
        """Left-padded processor inputs; pixels stay tensors all the way."""
        turns = [
            {"role": "system", "content": prompt},
            {"role": "user", "content": [{"type": "image"}]},
        ]
        chat = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        pixels = [torch.from_numpy(image).permute(2, 0, 1) for image in images]  # (3, H, W)
        inputs = self.processor(
            images=pixels, text=[chat + reply] * len(images), padding=True, return_tensors="pt"
        )
        return inputs.to(self.device)

    def _single_tokens(self, texts: list[str]) -> list[int]:
        tokens = [self.processor.tokenizer.encode(t, add_special_tokens=False) for t in texts]
        if any(len(token) != 1 for token in tokens):
            raise InvalidInput(
                "this model's tokenizer joins digits, so that no number can be read from one token; "
                "use the reading 'text'"
            )
        return [token[0] for token in tokens]

    def _first_tokens(self, texts: list[str]) -> list[int]:
        encode = self.processor.tokenizer.encode
        tokens = [encode(text, add_special_tokens=False)[0] for text in texts]
        if len(set(tokens)) != len(tokens):
            raise InvalidInput(
                "this model's tokenizer begins several of the quality words with the same token; use "
                "the reading 'text' or 'number'"
            )
        return tokens


class _LineComplete(StoppingCriteria):  # type: ignore[misc]
    """Ends each sequence of a batch once its reply holds a whole line that starts with `start`."""

    def __init__(self, processor: Any, prompt_tokens: int, start: str) -> None:
        self._processor = processor
        self._prompt_tokens = prompt_tokens
        self._start = start.casefold()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        last = self._processor.batch_decode(input_ids[:, -1:])
        done = [
            "\n" in text and self._complete(sequence)
            for text, sequence in zip(last, input_ids, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)

    def _complete(self, sequence: Tensor) -> bool:
        text = self._processor.decode(sequence[self._prompt_tokens :], skip_special_tokens=True)
        lines = text.split("\n")[:-1]  # the last one is still being written
        return any(line.strip(" *#-").casefold().startswith(self._start) for line in lines)
