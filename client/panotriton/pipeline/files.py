"""Names of the files that an export leaves beside a model's code, in its version folder.

The export writes them, the models read them, and the launcher looks whether they are there.
"""

from __future__ import annotations

__all__ = ["PROMPT", "TAGS", "TOKENIZER", "WEIGHTS", "settings_file"]

PROMPT = "prompt.txt"
TAGS = "tags.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "weights"
"""The parameter of a config.pbtxt that says, as a checksum, what the model was exported from."""


def settings_file(name: str) -> str:
    """What the export of the network `name` found out about it: `osediff.json`, `qwen.json`."""
    return f"{name}.json"
