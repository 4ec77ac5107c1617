"""What the `qwen` model asks of Triton's vLLM backend, and how it reads the answers.

The tensors are the backend's own: github.com/triton-inference-server/vllm_backend, src/model.py and
src/utils/request.py. One request per image: vLLM joins them itself. Neither torch nor vLLM is
imported.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InferenceFailed
from panotriton.pipeline.quality import (
    LEVEL_SKELETON,
    LEVELS,
    NUMBER_SKELETON,
    expected_level,
    expected_number,
    through_line,
)

__all__ = ["TOP_TOKENS", "Chat", "Question", "answer", "encode", "questions", "tensors"]

TOP_TOKENS = 20
"""Of the next token's distribution, so many are sent back: the engine's max_logprobs."""


@dataclass(frozen=True)
class Chat:
    """A folder's chat template around a system prompt, and the sampling that its model is made for.

    sampling: what is sent besides the temperature, which is 0; a repetition penalty, say.
    """

    before: str
    after: str
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """One request: a reply, or what the next token would be."""

    text: str
    max_tokens: int
    next_token: bool = False


def questions(chat: Chat, prompt: str, reading: str, max_new_tokens: int) -> list[Question]:
    """What has to be asked for one image's reading: number, levels or text.

    A number takes two: the digits before and after the point. Their long common beginning is in
    vLLM's prefix cache.
    """
    begun = chat.before + prompt + chat.after
    if reading == "number":
        parts = (NUMBER_SKELETON.removesuffix("0."), NUMBER_SKELETON)
        return [Question(begun + part, 1, next_token=True) for part in parts]
    if reading == "levels":
        return [Question(begun + LEVEL_SKELETON, 1, next_token=True)]
    return [Question(begun, max_new_tokens)]


def tensors(question: Question, png: bytes, chat: Chat) -> dict[str, NDArray[Any]]:
    """The backend's inputs, each [1], for an image as base64 of a PNG (`encode`)."""
    sampling: dict[str, Any] = {"temperature": 0, "max_tokens": question.max_tokens}
    # A penalty would bend what is read of the distribution.
    sampling |= {"logprobs": TOP_TOKENS} if question.next_token else chat.sampling
    inputs: dict[str, NDArray[Any]] = {
        "text_input": np.array([question.text.encode()], np.object_),
        "image": np.array([png], np.object_),
        "sampling_parameters": np.array([json.dumps(sampling).encode()], np.object_),
        "exclude_input_in_output": np.array([True]),
        "return_logprobs": np.array([question.next_token]),
    }
    return inputs


def encode(image: NDArray[np.uint8]) -> bytes:
    """(H, W, 3) RGB as base64 of a PNG: without loss, since JPEG's blocks are one of the faults."""
    _, data = cv2.imencode(
        ".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1]
    )
    return base64.b64encode(data.tobytes())


def answer(reading: str, replies: Sequence[bytes], stop_after: str) -> tuple[str, float]:
    """(text, value) from what came for each question: text_output, or the JSON of logprobs.

    A text ends after the line that begins with stop_after: vLLM itself stops only at fixed strings.
    Raises InferenceFailed where no token that could be an answer is among the likeliest.
    """
    if reading == "text":
        text = replies[0].decode()
        return (through_line(text, stop_after) if stop_after else None) or text, math.nan
    found = [_likeliest(reply) for reply in replies]
    if reading == "levels":
        return "", expected_level(_shares(found[0], list(LEVELS)))
    digits = [str(digit) for digit in range(10)]
    _, one = _shares(found[0], digits[:2])
    return "", expected_number(one, _shares(found[1], digits))


def _likeliest(reply: bytes) -> dict[str, float]:
    """Token → probability, of the one position that was asked for."""
    positions = json.loads(reply)
    if not positions:
        raise InferenceFailed("vLLM sent no logprobs: the engine's max_logprobs must be 20 or more")
    found: dict[str, float] = {}
    for each in positions[0].values():  # several tokens may be written alike
        token = each["decoded_token"] or ""
        found[token] = found.get(token, 0.0) + math.exp(each["logprob"])
    return found


def _shares(found: Mapping[str, float], candidates: Sequence[str]) -> list[float]:
    """Probabilities of the candidates against each other; 0 for one that is not among the likeliest.

    A candidate of several tokens counts by its first one.
    """
    shares = [
        sum(share for token, share in found.items() if token.strip() and text.startswith(token))
        for text in candidates
    ]
    if not sum(shares):
        raise InferenceFailed(
            f"none of {', '.join(map(repr, candidates))} is among the {len(found)} likeliest next tokens; "
            "use the mode 'generate' with this model"
        )
    return [share / sum(shares) for share in shares]
