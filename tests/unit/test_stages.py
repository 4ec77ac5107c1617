"""The mapping of stages and parts against the repository's own configs and models."""

from __future__ import annotations

import re
from pathlib import Path

from panotriton.pipeline.stages import ORDER, STAGES, is_part

REPOSITORY = Path(__file__).parents[2] / "model_repository"
HELPERS = {"options", "tap"}  # of the ensembles: they take no time worth a line


def test_every_stage_and_part_is_a_model_of_the_repository() -> None:
    models = {path.parent.name for path in REPOSITORY.glob("*/config.pbtxt")}
    assert set(ORDER) <= models


def test_the_ensembles_ask_all_stages_and_nothing_else() -> None:
    asked: set[str] = set()
    for ensemble in ("panorama", "panorama_encoded"):
        config = (REPOSITORY / ensemble / "config.pbtxt").read_text()
        asked |= set(re.findall(r'model_name: "(\w+)"', config))
    assert asked - HELPERS - {"panorama"} == set(STAGES)


def test_a_part_comes_after_the_last_stage_that_calls_it() -> None:
    for stage, parts in STAGES.items():
        assert not is_part(stage)
        for part in parts:
            assert is_part(part)
            assert ORDER[part] > ORDER[stage]
    ordered = sorted(ORDER, key=ORDER.__getitem__)
    assert ordered[-5:] == ["qwen_scorer", "qwen_describer", "qwen", "select", "interpolate"]
    assert ordered.index("osediff_vae_decoder") == ordered.index("qwen_scorer") - 1


def test_a_model_that_is_neither_is_no_part() -> None:
    assert not is_part("tap")
