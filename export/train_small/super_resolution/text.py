"""The prompt's side: a tokenizer with few merges and a text encoder that is never trained."""

from __future__ import annotations

import itertools

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

__all__ = ["PROMPT_WIDTH", "TAGS", "new_text_encoder", "new_tokenizer"]

PROMPT_WIDTH = 32  # cross_attention_dim = the text encoder's hidden size

# Words for the tokenizer's merges and for the prompts of training.
_WORDS = """
building car cat chair city clear cloud coast crane day desk dog door evening field fence flower
forest garden grass hill house indoor lamp light moon morning mountain night outdoor park path
person photo plant red river road rock roof room sea sharp sky snow stone street sun sunset table
tower tree wall water window wood
"""
TAGS = _WORDS.split()


def new_tokenizer(merges: int = 96) -> CLIPTokenizer:
    """CLIP's byte alphabet in CLIP's order ("!" is 0 and pads, as in SD 2.1) and a few merges."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in kept] + [chr(256 + i) for i in range(256 - len(kept))]
    pairs = _merges([[*tag[:-1], tag[-1] + "</w>"] for tag in TAGS], merges)
    words = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in pairs]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=pairs, pad_token="!", model_max_length=77)  # noqa: S106


def _merges(words: list[list[str]], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: join the commonest pair, `count` times; ties go to the first in order."""
    joined: list[tuple[str, str]] = []
    for _ in range(count):
        tally: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                tally[pair] = tally.get(pair, 0) + 1
        best = min(tally, key=lambda pair: (-tally[pair], pair))
        joined.append(best)
        words = [_join(word, best) for word in words]
    return joined


def _join(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for letter in word:
        if out and (out[-1], letter) == pair:
            out[-1] += letter
        else:
            out.append(letter)
    return out


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Never trained: its embeddings only have to differ, and the UNet learns to bear with them."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=PROMPT_WIDTH,
        intermediate_size=64,
        projection_dim=PROMPT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)
