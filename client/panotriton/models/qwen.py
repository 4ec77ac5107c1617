"""A Qwen-VL model that answers about images in batches: whole replies, or one number read directly.

Imports torch and transformers: for the server's `qwen` model and for use without a server.

Readings. `text` decodes greedily. `number` and `levels` decode nothing: the reply's skeleton is
teacher-forced and the answer is the expectation over the next token, in one forward pass.

- number: after "Final Score: 0." the ten digits, and one position back 0 against 1, see
  `quality.expected_number`.
- levels: after "The quality of the pair is" five words, weighted 1, 0.75, 0.5, 0.25, 0 as in
  "Q-Align: Teaching LMMs for Visual Scoring via Discrete Text-Defined Levels", Wu et al., ICML 2024.

The system turn comes before the image and is the same for every image: its keys and values are
computed once and kept. Rows of a batch are then laid out as prefix | padding | image and the rest,
since what is shared has to begin at the same place in each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import is_flash_attn_2_available

from panotriton.errors import InvalidInput
from panotriton.models.qwen_cache import (
    LENGTHS,
    StaticCaches,
    compile_each_shape,
    read_only,
    repeated,
)
from panotriton.models.qwen_memory import check_fits, estimate, free_ram_bytes, stored_parameters
from panotriton.models.qwen_windows import join_windows
from panotriton.pipeline.quality import (
    LEVEL_SKELETON,
    LEVELS,
    NUMBER_SKELETON,
    expected_level,
    expected_number,
    through_line,
)

__all__ = [
    "FixedVision",
    "QwenVL",
    "check_memory",
    "choose_attention",
    "choose_dtype",
    "open_processor",
]

_PREFIXES = 4
_TRIAL_TOKENS = 4
_PREFIX_TOKENS = 2048  # a longer system turn is computed each time
_FILLING = np.zeros((56, 56, 3), np.uint8)  # few image tokens

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class FixedVision:
    """A vision tower for one size of image, in place of the model's own.

    grid: patches (down, across). see: (n, patches, values of a patch) fp32 → image tokens
    (n, tokens, hidden) fp32. Images of other sizes are seen by the model's own tower.
    """

    grid: tuple[int, int]
    see: Callable[[NDArray[np.float32]], NDArray[np.float32]]


class QwenVL:
    """The weights of one Hugging Face folder on one device; no code of the folder is run.

    max_batch bounds how many images are worked on at once, and with the processor's max_pixels the
    memory: what cannot fit is refused before the weights are read, with InvalidInput. max_pixels of
    None leaves the folder's own bound. memory_fraction: of a GPU's memory, what this process may take; the
    rest is for networks beside it. dtype is "auto", "bfloat16", "float16" or "float32"; auto is what
    the weights are stored in, on a GPU bfloat16 where it knows that. decode is "dynamic" or "static": with
    buffers of fixed shape (`StaticCaches`), for which transformers compiles the steps of a reply on a GPU
    and replays them as CUDA graphs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        max_batch: int = 16,
        max_pixels: int | None = None,
        memory_fraction: float = 1.0,
        prefix_cache: bool = True,
        vision: FixedVision | None = None,
        decode: str = "dynamic",
    ) -> None:
        self.device = device
        self.max_batch = max_batch
        self.vision = vision
        self.processor = open_processor(folder)
        self.processor.tokenizer.padding_side = "left"
        size = self.processor.image_processor.size
        if max_pixels is not None:
            size["longest_edge"] = max_pixels
        on_gpu = torch.device(device).type == "cuda"
        dtype = choose_dtype(dtype, on_gpu and _knows_bf16(device), on_gpu)
        attention = choose_attention(dtype, on_gpu and is_flash_attn_2_available())
        bounds = (max_batch, size["longest_edge"], memory_fraction)
        check_memory(folder, dtype, device, *bounds, static=decode == "static")
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(memory_fraction, device)
        model, loading = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        if missing := sorted(loading["missing_keys"]):  # which would be random numbers
            raise InvalidInput(
                f"{folder} lacks the weights of {missing[0]} and {len(missing) - 1} more; expected all "
                "of the model's: copy the whole folder"
            )
        self.model = model.to(device).eval()
        if attention == "sdpa":
            join_windows(self.model)
        # Flash attention packs rows by their padding, which has only been tried at one end of a row.
        self.prefix_cache = prefix_cache and attention == "sdpa"
        self._prefixes: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._static = StaticCaches(self.model.config, max_batch) if decode == "static" else None
        if self._static and on_gpu:
            self.model.generation_config.compile_config = compile_each_shape()

    def try_out(self, prompt: str) -> str:
        """The first words about a small picture. Raises InvalidInput where no real answer comes out."""
        image = np.linspace(0, 255, 3 * 56 * 56).astype(np.uint8).reshape(56, 56, 3)
        if prompt.strip() not in self._chat(prompt):
            raise InvalidInput(
                "the chat template leaves the system turn out; expected one through which the prompt "
                "arrives"
            )
        logits = self._skeleton_logits([image], prompt, NUMBER_SKELETON, keep=1)
        if not bool(logits.isfinite().all()):
            raise InvalidInput(
                f"what it computes in {self.model.dtype} is no number; expected finite logits: damaged "
                "weights, or another --dtype"
            )
        return self.reply([image], prompt, _TRIAL_TOKENS)[0]

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
        """The final score that the model expects, 0 to 1, one per image."""
        return self._batched(images, lambda part: self._read_number(part, prompt))

    def read_level(self, images: Sequence[Image], prompt: str) -> list[float]:
        """The expected level of quality, 0 (bad) to 1 (excellent), one per image."""
        return self._batched(images, lambda part: self._read_level(part, prompt))

    def inputs(self, images: list[Image], prompt: str, reply: str = "") -> dict[str, Any]:
        """What the network takes for (H, W, 3) uint8 images, one row each, padded at the left.

        reply: how the replies begin. Pixels stay tensors all the way: the processor resizes them as
        qwen-vl-utils' process_vision_info does to PIL images, to within one grey level.
        """
        chat = self._chat(prompt)
        # (3, H, W), resized where they are
        pixels = [torch.from_numpy(image).to(self.device).permute(2, 0, 1) for image in images]
        inputs = self.processor(
            images=pixels, text=[chat + reply] * len(images), padding=True, return_tensors="pt"
        )
        return self._seen(dict(inputs.to(self.device)))

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
        self._forget()
        rows = self._static.rows(len(images)) if self._static else len(images)
        inputs = self.inputs([*images, *[_FILLING] * (rows - len(images))], prompt)
        length = inputs["input_ids"].shape[1]
        stop = StoppingCriteriaList([_Filled(len(images))] if rows > len(images) else [])
        if stop_after:
            stop.append(_LineComplete(self.processor, length, stop_after))
        tokens = self.model.generate(
            **self._with_cache(inputs, length + limit),
            max_new_tokens=limit,
            do_sample=False,
            stopping_criteria=stop,
        )
        replies: list[str] = self.processor.batch_decode(
            tokens[: len(images), length:], skip_special_tokens=True
        )
        return replies

    def _with_cache(self, inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
        """For replies: the inputs, and where there is one the cache that they go on from.

        tokens: at most, of a row and its reply.
        """
        rows, kept = len(inputs["input_ids"]), self._prefix(inputs)
        first = kept[1] if kept else None
        if self._static:
            inputs = inputs | {"past_key_values": self._static.take(rows, tokens, first)}
        elif first is not None:
            inputs = inputs | {"past_key_values": repeated(first, rows)}
        return _prefix_first(inputs, kept[0]) if kept else inputs

    def _read_number(self, images: list[Image], prompt: str) -> list[float]:
        logits = self._skeleton_logits(images, prompt, NUMBER_SKELETON, keep=3)  # (B, 3, V)
        digits = self._single_tokens([str(digit) for digit in range(10)])
        ones = logits[:, 0, digits[:2]].softmax(-1)[:, 1]  # (B): P(1) against 0 before the point
        tenths = logits[:, 2, digits].softmax(-1)  # (B, 10): after it
        return [expected_number(*row) for row in zip(ones.tolist(), tenths.tolist(), strict=True)]

    def _read_level(self, images: list[Image], prompt: str) -> list[float]:
        logits = self._skeleton_logits(images, prompt, LEVEL_SKELETON, keep=1)  # (B, 1, V)
        levels = logits[:, 0, self._first_tokens(list(LEVELS))].softmax(-1)  # (B, 5)
        return [expected_level(shares) for shares in levels.tolist()]

    @torch.inference_mode()
    def _skeleton_logits(
        self, images: list[Image], prompt: str, skeleton: str, keep: int
    ) -> Tensor:
        """fp32 logits (B, keep, V) of the last positions once the reply has begun with `skeleton`."""
        self._forget()
        inputs = self.inputs(images, prompt, skeleton)
        cached = self._prefix(inputs)
        inputs = self._after_prefix(inputs, *cached) if cached else inputs | {"use_cache": False}
        logits: Tensor = self.model(**inputs, logits_to_keep=keep).logits
        return logits.float()

    def _chat(self, prompt: str) -> str:
        """The conversation up to where the reply begins."""
        turns = [
            {"role": "system", "content": prompt},
            {"role": "user", "content": [{"type": "image"}]},
        ]
        chat: str = self.processor.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return chat

    def _forget(self) -> None:
        """Drop the rotary offsets of the call before: some releases of transformers reuse them.

        For rows that are others, or more or fewer, whenever a call begins with a cache, as ours do.
        """
        self.model.model.rope_deltas = None

    def _seen(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Replace the pixels by image tokens where the fixed tower sees any of the images."""
        grids = [tuple(grid[1:]) for grid in inputs["image_grid_thw"].tolist()]
        if self.vision is None or self.vision.grid not in grids:
            return inputs
        patches = inputs.pop("pixel_values").split([down * across for down, across in grids])
        fixed = [i for i, grid in enumerate(grids) if grid == self.vision.grid]
        found = self.vision.see(torch.stack([patches[i] for i in fixed]).cpu().numpy())
        tokens = dict(zip(fixed, torch.from_numpy(found).to(self.device), strict=True))
        for i in set(range(len(grids))) - set(fixed):
            grid = inputs["image_grid_thw"][i : i + 1]
            (tokens[i],) = self.model.model.get_image_features(patches[i], grid).pooler_output
        ordered = BaseModelOutputWithPooling(pooler_output=[tokens[i] for i in range(len(grids))])
        return inputs | {"mm_encoder_outputs": {"image": ordered}}

    def _prefix(self, inputs: dict[str, Any]) -> tuple[int, Any] | None:
        """How many tokens come before the image, and a cache that holds them, of one row."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        first = ids[0][mask[0]]
        length = int((first == self.model.config.image_token_id).int().argmax())
        if not self.prefix_cache or not 0 < length <= _PREFIX_TOKENS:
            return None
        key = tuple(first[:length].tolist())
        if key not in self._prefixes:
            self._prefixes[key] = self._computed(first[None, :length])
            while len(self._prefixes) > _PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return length, self._prefixes[key]

    def _computed(self, ids: Tensor) -> Any:
        """Keys and values of text alone, (1, L) token ids."""
        places = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)  # (3, 1, L)
        return self.model(
            input_ids=ids, position_ids=places, use_cache=True, logits_to_keep=1
        ).past_key_values

    def _after_prefix(self, inputs: dict[str, Any], length: int, cache: Any) -> dict[str, Any]:
        """What is left to compute, with the rotary positions that it has in the whole."""
        whole = _prefix_first(inputs, length)
        places, _ = self.model.model.get_rope_index(
            whole["input_ids"],
            whole["mm_token_type_ids"],
            image_grid_thw=whole["image_grid_thw"],
            attention_mask=whole["attention_mask"],
        )  # (3, B, L)
        rest = {name: whole[name][:, length:] for name in ("input_ids", "mm_token_type_ids")}
        begun = read_only(cache, len(whole["input_ids"]))
        rest |= {"position_ids": places[..., length:], "past_key_values": begun, "use_cache": True}
        return whole | rest

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


def open_processor(folder: Path) -> Any:
    """The folder's processor; where it has no chat template, with the tokenizer's."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if not processor.chat_template:
        found = processor.tokenizer.chat_template
        processor.chat_template = found.get("default") if isinstance(found, dict) else found
    return processor


def _knows_bf16(device: str) -> bool:
    """Whether that GPU computes in bfloat16 itself: every one can be made to, slowly."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def choose_dtype(dtype: str, bf16_supported: bool, on_gpu: bool) -> str:
    """auto on a GPU: half the memory and its matrix units; bfloat16 keeps float32's range."""
    if dtype != "auto" or not on_gpu:
        return dtype
    return "bfloat16" if bf16_supported else "float16"


def choose_attention(dtype: str, flash_installed: bool) -> str:
    """Flash attention where it is installed and knows the dtype, else PyTorch's own fused attention."""
    flash = flash_installed and dtype in ("bfloat16", "float16")
    return "flash_attention_2" if flash else "sdpa"


def check_memory(
    folder: Path,
    dtype: str,
    device: str,
    max_batch: int,
    max_pixels: int,
    fraction: float,
    *,
    static: bool = False,
) -> None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    stored = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
    where = torch.device(device)
    if where.type == "cuda":
        left, total = torch.cuda.mem_get_info(where)
        free, name = (
            min(left, int(fraction * total)),
            f"{where}, of which it may take {fraction:.0%},",
        )
    else:
        free, name = free_ram_bytes(), str(where)
    needed = partial(
        estimate,
        config.to_dict(),
        stored_parameters(folder),
        stored.itemsize,
        further_tokens=LENGTHS if static else 0,
    )
    check_fits(needed, max_batch, max_pixels, free, name)


def _prefix_first(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """Move each row's padding from before its first `length` tokens to after them."""
    mask = inputs["attention_mask"]
    padding = (mask == 0).sum(1, keepdim=True)  # (B, 1)
    place = torch.arange(mask.shape[1], device=mask.device)  # (L)
    after = torch.where(place < length + padding, place - length, place)
    source = torch.where(place < length, place + padding, after)  # (B, L)
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    return inputs | {name: inputs[name].gather(1, source) for name in names}


class _Filled(StoppingCriteria):  # type: ignore[misc]
    """Ends at once what only fills up a batch: the rows from `count` on."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.arange(len(input_ids), device=input_ids.device) >= self._count


class _LineComplete(StoppingCriteria):  # type: ignore[misc]
    """Ends each sequence of a batch once its reply holds a whole line that starts with `start`."""

    def __init__(self, processor: Any, prompt_tokens: int, start: str) -> None:
        self._processor = processor
        self._prompt_tokens = prompt_tokens
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        last = self._processor.batch_decode(input_ids[:, -1:])
        done = [
            "\n" in text and self._complete(sequence)
            for text, sequence in zip(last, input_ids, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)

    def _complete(self, sequence: Tensor) -> bool:
        text = self._processor.decode(sequence[self._prompt_tokens :], skip_special_tokens=True)
        return through_line(text, self._start) is not None
