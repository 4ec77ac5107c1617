"""Trains a very small Qwen2.5-VL that judges pairs and describes views, from nothing, on a CPU.

    python -m panotriton_export.train_small.qwen --panoramas tests/data/panoramas \
        --output export/small/qwen --seed 7

The result is an ordinary Hugging Face folder of the real classes. Nothing is downloaded. The same
seed and step counts give the same training data and order; the last bits of the weights depend on
the processor and the version of torch.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from dataclasses import astuple, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from panotriton.pipeline.quality import LEVEL_SKELETON, LEVELS

from .degrade import FAULTS
from .replies import Reply, describe, level, look_at, number, six_lines
from .scenes import Sample, Scene, cut, load_panoramas, make_sample, vary

__all__ = ["main", "prompts"]

# Bounds a 1:2 pair to 168 × 336 (72 tokens) and a square view to 224 × 224 (64 tokens).
_MAX_PIXELS = 57_000
_MIN_PIXELS = 56 * 56
_VOCAB = 768
_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

# Qwen2.5-VL's own turns; images and text only, and no default system turn.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--panoramas", type=Path, default=Path("tests/data/panoramas"))
    parser.add_argument("--output", type=Path, default=Path("export/small/qwen"))
    parser.add_argument("--vision-steps", type=int, default=2000)
    parser.add_argument("--text-steps", type=int, default=1100)
    parser.add_argument("--all-steps", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--groups", type=int, default=32, help="camera draws for each panorama")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    trainer = Trainer(build_processor(), options.seed)
    print("cutting the panoramas", flush=True)
    scenes = cut(load_panoramas(options.panoramas), range(options.groups))
    trainer.start(scenes)
    trainer.train_vision(scenes, options.vision_steps)
    trainer.train_text(scenes, options.text_steps)
    trainer.train_all(scenes, options.all_steps)
    trainer.save(options.output)


def prompts() -> dict[str, str]:
    folder = files("panotriton.prompts")
    return {
        name: (folder / f"{name}.txt").read_text(encoding="utf-8").strip()
        for name in ("quality", "describe")
    }


# ---- tokenizer and processor -------------------------------------------------------------------


def build_processor() -> Qwen2_5_VLProcessor:
    tokenizer = build_tokenizer()
    size = {"shortest_edge": _MIN_PIXELS, "longest_edge": _MAX_PIXELS}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(size)),
        chat_template=_CHAT_TEMPLATE,
    )


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen's own pre-tokenizer (one digit a token), trained on our few texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _texts(),
        trainers.BpeTrainer(
            vocab_size=_VOCAB - len(_SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token="<|endoftext|>",  # noqa: S106
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        extra_special_tokens=list(_SPECIAL),
        padding_side="left",
        model_max_length=4096,
    )


def _texts() -> list[str]:
    """The prompts and the replies, so that few tokens hold them."""
    rng = np.random.default_rng(0)
    noise = (rng.random((200, 8, 8, 3)) * rng.random((200, 1, 1, 3)) * 255).astype(np.uint8)
    described = [describe(look_at(image)).said for image in noise]
    chat = ["system\n", "user\n", "assistant\n"] * 50
    lines = re.findall(r"^[A-Z].*: ", prompts()["quality"], flags=re.MULTILINE) * 50
    levels = [LEVEL_SKELETON + word for word in LEVELS] * 50
    return list(prompts().values()) * 20 + described + chat + lines + levels


# ---- model -------------------------------------------------------------------------------------


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """About 0.6 M parameters."""
    hidden, heads = 96, 4
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 224,
            "num_hidden_layers": 3,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 4, 4],  # half of the head's 24
            },
            "bos_token_id": None,
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
            "tie_word_embeddings": True,
            "initializer_range": 0.08,  # 0.02 is for widths in the thousands
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [2],
            "initializer_range": 0.12,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>")
    )
    return model


@torch.no_grad()
def start_patches(model: Qwen2_5_VLForConditionalGeneration, pixels: torch.Tensor) -> None:
    """Start the patch embedding as 64 cosine patterns, equally strong in the median of `pixels`
    (n, 1176), and the first gated layer as their magnitudes.

    Fine patterns are faint in pictures; made as strong as coarse ones, they let a tiny network
    see from the first step what blur, noise and blocks change.
    """
    weight = model.model.visual.patch_embed.proj.weight  # (64, 3, 2, 14, 14)
    patterns = (_cosines(14)[:, :, None] / 2).expand_as(weight)
    spread = (pixels @ patterns.flatten(1).T).abs().median(dim=0).values  # (64,)
    weight.copy_(patterns / spread[:, None, None, None, None])
    mlp: Any = model.model.visual.blocks[0].mlp  # silu(2z)·1 + silu(-2z)·1 is about |2z|
    mlp.gate_proj.weight.copy_(torch.cat([torch.eye(64), -torch.eye(64)]) * 2)  # (128, 64)
    mlp.up_proj.weight.mul_(0.1)
    mlp.up_proj.bias.fill_(1.0)


def _cosines(side: int) -> torch.Tensor:
    """64 orthonormal cosine patterns, (64, 3, side, side): 44 of luma, 10 each of two colours."""
    u = torch.arange(side)
    basis = torch.cos(math.pi * u[:, None] * (2 * u + 1) / (2 * side)) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)  # (frequency, position), orthonormal
    low = [(i, j) for i in range(6) for j in range(6) if i + j < 6]  # 21
    spread = [(i, j) for i in (0, 4, 7, 10, 13) for j in (0, 4, 7, 10, 13) if i + j > 5]
    spread.append((3, 3))  # 23
    colour = [(i, j) for i in range(4) for j in range(4) if i + j < 4]  # 10
    axes = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
    axes /= axes.norm(dim=1, keepdim=True)
    plan = [(0, f) for f in low + spread] + [(1, f) for f in colour] + [(2, f) for f in colour]
    patterns = [
        axes[c][:, None, None] * basis[i][:, None] * basis[j][None, :] for c, (i, j) in plan
    ]
    return torch.stack(patterns)


# ---- training ----------------------------------------------------------------------------------


@dataclass
class Batch:
    pixels: torch.Tensor  # (patches of all images, 1176)
    grids: torch.Tensor  # (B, 3)
    facts: torch.Tensor  # (B, 11) scores and strengths or (B, 9) look
    replies: list[Reply]
    task: str  # quality | describe


# How often a judgement is the six lines, the number alone, the level alone. A short one has few tokens
# and counts as much as several of the long one's.
_REPLY_SHARES = (0.65, 0.22, 0.13)
_SHORT_WEIGHT = 4.0
# Brings the nine measures of a Look to the spread of the scores.
_LOOK_UNITS = (0.8, 0.35, 0.5, 0.15, 0.8, 0.6, 0.2, 0.15, 0.2)


def _facts(sample: Sample) -> list[float]:
    strengths = [sample.strength if fault == sample.fault else 0.0 for fault in FAULTS]
    return [*astuple(sample.scores), sample.scores.final, *strengths]


def _share_of_peak(step: int, steps: float) -> float:
    """Warm up over 100 steps, then a cosine from 1 down to 0.02."""
    return min(1.0, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * step / steps))


class Trainer:
    """Next-token loss on the replies; two training-only heads on the pooled image tokens help."""

    def __init__(self, processor: Qwen2_5_VLProcessor, seed: int) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.model = build_model(self.tokenizer)
        out = self.model.config.vision_config.out_hidden_size
        scores = nn.Linear(2 * out, 6 + len(FAULTS))
        nn.init.constant_(scores.bias[:6], 0.7)
        self.heads = nn.ModuleDict({"quality": scores, "describe": nn.Linear(2 * out, 9)})
        self.seed, self.rng = seed, np.random.default_rng(seed)
        self.prompts = prompts()
        digits = self.tokenizer.convert_tokens_to_ids([str(d) for d in range(10)])
        self.token_weight = torch.full((len(self.tokenizer),), 0.3)
        self.token_weight[digits] = 1.5
        levels = [self.tokenizer.encode(word)[0] for word in LEVELS]
        self.token_weight[levels] = 1.5

    def start(self, scenes: list[Scene]) -> None:
        start_patches(self.model, self._collate([s.pair for s in scenes[:64]], [], [], "").pixels)

    def train_vision(self, scenes: list[Scene], steps: int) -> None:
        parameters = [*self.model.model.visual.parameters(), *self.heads.parameters()]
        # The rate ends at a quarter of its peak: the last phase takes it down.
        for step, rate in self._steps(steps, parameters, 3e-3, "vision", horizon=1.5):
            batch = self.batch(scenes, 16)
            rate(self._facts_loss(batch, self._see(batch)), step)

    def train_text(self, scenes: list[Scene], steps: int) -> None:
        """Only the language side, on image tokens computed once."""
        self.rng = np.random.default_rng(self.seed + 1)
        bank = [self._seen_batch(scenes) for _ in range(steps // 4)]
        parameters = list(self.model.model.language_model.parameters())
        for step, rate in self._steps(steps, parameters, 2e-3, "text"):
            rate(self._reply_loss(*bank[step % len(bank)]), step)

    @torch.no_grad()
    def _seen_batch(self, scenes: list[Scene]) -> tuple[Batch, torch.Tensor]:
        batch = self.batch(scenes, 16)
        seen = self._see(batch)
        return replace(batch, pixels=torch.empty(0)), seen  # 21 MB lighter

    def train_all(self, scenes: list[Scene], steps: int) -> None:
        self.rng = np.random.default_rng(self.seed + 2)
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        for step, rate in self._steps(steps, parameters, 1e-3, "all"):
            batch = self.batch(scenes, 16)
            seen = self._see(batch)
            rate(self._reply_loss(batch, seen) + self._facts_loss(batch, seen), step)

    def _steps(
        self,
        steps: int,
        parameters: list[nn.Parameter],
        peak: float,
        name: str,
        horizon: float = 1.0,
    ) -> Any:
        """Yield (step, update); update(loss, step) takes one step of AdamW.

        The rate falls along a cosine that is `horizon` times as long as the steps.
        """
        optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
        started, mean = time.monotonic(), 0.0

        def update(loss: torch.Tensor, step: int) -> None:
            nonlocal mean
            for group in optimizer.param_groups:
                group["lr"] = peak * _share_of_peak(step, steps * horizon)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
            if step % 50 == 49 or step == steps - 1:
                spent = time.monotonic() - started
                print(f"{name} {step + 1}/{steps} loss {mean:.4f} {spent:.0f} s", flush=True)

        for step in range(steps):
            yield step, update

    def batch(self, scenes: list[Scene], size: int) -> Batch:
        if self.rng.random() < 0.33:
            return self._describe_batch(scenes, size)
        samples = [make_sample(scenes, self.rng) for _ in range(size)]
        facts = [_facts(sample) for sample in samples]
        replies = [self._judgement(sample) for sample in samples]
        return self._collate([sample.pair for sample in samples], facts, replies, "quality")

    def _judgement(self, sample: Sample) -> Reply:
        kind = self.rng.choice(3, p=_REPLY_SHARES)
        if kind == 0:
            return six_lines(sample.scores)
        return number(sample.scores) if kind == 1 else level(sample.scores, self.rng)

    def _describe_batch(self, scenes: list[Scene], size: int) -> Batch:
        picked = self.rng.integers(len(scenes), size=size)
        views = [vary(scenes[i].right, self.rng) for i in picked]
        looks = [look_at(view) for view in views]
        facts = [np.divide(astuple(look), _LOOK_UNITS) for look in looks]
        return self._collate(views, facts, [describe(look) for look in looks], "describe")

    def _collate(
        self, images: list[Any], facts: list[Any], replies: list[Reply], task: str
    ) -> Batch:
        tensors = [torch.from_numpy(np.ascontiguousarray(i)).permute(2, 0, 1) for i in images]
        seen = self.processor.image_processor(images=tensors, return_tensors="pt")
        targets = torch.tensor(np.array(facts), dtype=torch.float32)
        return Batch(seen["pixel_values"], seen["image_grid_thw"], targets, replies, task)

    def _see(self, batch: Batch) -> torch.Tensor:
        """Image tokens (B, n, hidden)."""
        tokens: torch.Tensor = self.model.model.visual(
            batch.pixels, grid_thw=batch.grids
        ).pooler_output
        return tokens.reshape(len(batch.grids), -1, tokens.shape[-1])

    def _facts_loss(self, batch: Batch, seen: torch.Tensor) -> torch.Tensor:
        _, rows, columns = (batch.grids[0] // 2).tolist()
        grid = seen.reshape(len(seen), rows, columns, -1)  # (B, rows, columns, hidden)
        halves = torch.cat(
            [grid[:, :, : columns // 2].mean((1, 2)), grid[:, :, columns // 2 :].mean((1, 2))], 1
        )
        guess = self.heads[batch.task](halves)
        return 10.0 * nn.functional.mse_loss(guess, batch.facts)

    def _reply_loss(self, batch: Batch, seen: torch.Tensor) -> torch.Tensor:
        """Runs the system turn, the same for the whole batch, once and shares its keys and values."""
        ids, types, taught, prefix = self._chat(batch)
        config = self.model.config
        positions, _ = self.model.model.get_rope_index(
            ids[:1], types[:1], image_grid_thw=batch.grids[:1]
        )  # (3, 1, L): every row is laid out alike
        embeds = self.model.get_input_embeddings()(ids)
        mask = (ids == config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(mask, seen.reshape(-1, seen.shape[-1]))
        shared = int(types[0].argmax())  # tokens before the image
        cache = self.model(
            inputs_embeds=embeds[:1, :shared], position_ids=positions[..., :shared], use_cache=True
        ).past_key_values
        cache.batch_repeat_interleave(len(ids))
        logits = self.model(
            inputs_embeds=embeds[:, shared:],
            position_ids=positions[..., shared:].expand(-1, len(ids), -1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=ids.shape[1] - prefix + 1,
        ).logits[:, :-1]  # (B, reply, vocab)
        targets = ids[:, prefix:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        weights = self._weights(batch.task, targets, losses.detach())
        weights = weights * taught[:, prefix:]
        loss: torch.Tensor = (losses * weights).sum() / weights.sum()
        return loss

    def _weights(self, task: str, targets: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """Of a score the digits matter, of a description the words still got wrong."""
        if task == "quality":
            return self.token_weight[targets]
        return 1.02 - torch.exp(-losses)

    def _chat(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Token ids (B, L) padded at the right, token types (B, L), how much each is taught (B, L) and
        the length of the prompt."""
        chat = chat_text(self.processor, self._prompt(batch.task))
        image = "<|image_pad|>" * int(batch.grids[0].prod() // 4)
        head = self.tokenizer(chat.replace("<|image_pad|>", image))["input_ids"]
        rows, taught = zip(*(self._tail(reply) for reply in batch.replies), strict=True)
        longest, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = torch.tensor([head + row + [pad] * (longest - len(row)) for row in rows])
        weight = torch.tensor(
            [[0.0] * len(head) + row + [0.0] * (longest - len(row)) for row in taught]
        )
        return ids, (ids == self.model.config.image_token_id).int(), weight, len(head)

    def _tail(self, reply: Reply) -> tuple[list[int], list[float]]:
        """A reply's tokens, its end and how much each is taught."""
        given = self.tokenizer(reply.given)["input_ids"] if reply.given else []
        said = self.tokenizer(reply.said)["input_ids"]
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        weight = _SHORT_WEIGHT if reply.given else 1.0
        return [*given, *said, end], [0.0] * len(given) + [weight] * (len(said) + 1)

    def _prompt(self, task: str) -> str:
        """The prompt, or in one of four batches a part of it: the wording should not matter much."""
        prompt = self.prompts[task]
        if self.rng.random() < 0.75:
            return prompt
        sentences = re.split(r"(?<=[.:;])\s+", prompt)
        kept = self.rng.random(len(sentences)) < 0.6
        kept[self.rng.integers(len(sentences))] = True
        return " ".join(s for s, keep in zip(sentences, kept, strict=True) if keep)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def chat_text(processor: Qwen2_5_VLProcessor, prompt: str) -> str:
    turns = [
        {"role": "system", "content": prompt},
        {"role": "user", "content": [{"type": "image"}]},
    ]
    text: str = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text


if __name__ == "__main__":
    main()
