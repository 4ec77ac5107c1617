"""A group's stages in the order of the pipeline, with the models that these call in their turn.

The time of a part is inside its stage's own; where instances work at once, the parts' may add up to more.
"""

from __future__ import annotations

from panotriton.pipeline.networks import PIPELINE, parts

__all__ = ["ORDER", "STAGES", "is_part"]

STAGES = {
    stage: parts(stage)
    for stage in (
        "decode",
        "preprocess",
        PIPELINE,
        "qwen_scorer",
        "qwen_describer",
        "select",
        "interpolate",
    )
}
"""Stage → its parts; both are models of the server."""

_MODELS = [model for stage, called in STAGES.items() for model in (stage, *called)]
ORDER = {model: place for place, model in enumerate(_MODELS)}
"""Stage or part → its place in a table; a part that several stages call comes after the last of them."""


def is_part(model: str) -> bool:
    """Whether the model's time is inside a stage's; a model that is neither is no part."""
    return model in ORDER and model not in STAGES
