"""A group's stages in the order of the pipeline, with the models that these call in their turn.

The time of a part is inside its stage's own; where instances work at once, the parts' may add up to more.
"""

from __future__ import annotations

from panotriton.pipeline.networks import NETWORKS, PIPELINE

__all__ = ["ORDER", "STAGES", "is_part"]

STAGES: dict[str, tuple[str, ...]] = {
    "decode": (),
    "preprocess": (),
    PIPELINE: NETWORKS[PIPELINE].models,
    "qwen_scorer": ("qwen",),
    "qwen_describer": ("qwen",),
    "select": (),
    "interpolate": (),
}
"""Stage → its parts; both are models of the server."""

_MODELS = [model for stage, parts in STAGES.items() for model in (stage, *parts)]
ORDER = {model: place for place, model in enumerate(_MODELS)}
"""Stage or part → its place in a table; a part that several stages call comes after the last of them."""


def is_part(model: str) -> bool:
    """Whether the model's time is inside a stage's; a model that is neither is no part."""
    return model in ORDER and model not in STAGES
