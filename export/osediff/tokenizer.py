"""CLIP's tokenizer as one file of the `tokenizers` library: the server needs no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from panotriton.errors import ExportError
from panotriton.pipeline.scratch import atomic
from panotriton_export.osediff.base import PROMPT_TOKENS

__all__ = ["write_tokenizer"]

_CHECKED = (
    "",
    "building, sky, tree, , clean, high-resolution, 8k,",
    "a very long prompt " * 40,
    "Ünïcode, 街並み, Ωmega, naïve café 🌲!",
    "  Two\n lines!! and   SPACES, ",
)


def write_tokenizer(tokenizer: Any, path: Path) -> None:
    """Write `path` with truncation and padding to 77 tokens built in.

    Raises ExportError where it gives other ids than the transformers tokenizer.
    """
    bare = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bare.enable_truncation(PROMPT_TOKENS)
    bare.enable_padding(
        length=PROMPT_TOKENS, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
    )
    for text in _CHECKED:
        _check_equal(bare, tokenizer, text)
    with atomic(path) as part:
        bare.save(str(part))


def _check_equal(bare: Tokenizer, tokenizer: Any, text: str) -> None:
    expected = tokenizer(
        text, max_length=PROMPT_TOKENS, padding="max_length", truncation=True
    ).input_ids
    got = bare.encode(text).ids
    if got != expected:
        raise ExportError(
            f"the exported tokenizer gives {got} for {text!r}; transformers gives {expected}"
        )
