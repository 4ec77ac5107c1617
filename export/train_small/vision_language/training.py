"""Vision first, then the replies on what it sees, then both."""

from __future__ import annotations

import math
import re
import time
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Qwen2_5_VLProcessor

from panotriton.pipeline.quality import LEVELS

from .degrade import FAULTS
from .model import build_model, start_patches
from .processor import prompts
from .replies import Reply, describe, level, look_at, number, six_lines
from .scenes import Sample, Scene, make_sample, vary

__all__ = ["Trainer"]


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
