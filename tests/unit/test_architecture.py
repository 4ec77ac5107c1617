"""The drawing of the repository: every arrow carries a tensor, and the calls are those of the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.append(
    str(Path(__file__).parents[2] / "docs")
)  # the scripts find each other as scripts do

import architecture
from calls import calls

# `a -->|"…"| b`, also dashed.
ARROW = re.compile(r'^ +(\w+) -\.?->\|"(.*)"\| (\w+)$', re.MULTILINE)
# `NAME dtype (dims)`
CARRIED = re.compile(r"\w+ [a-z]+\d* \([^()]+\)")


def test_no_arrow_is_without_a_tensors_name() -> None:
    drawn = ARROW.findall(architecture.page())
    assert len(drawn) > 40
    for source, carried, target in drawn:
        for tensor in carried.split("<br/>"):
            assert CARRIED.fullmatch(tensor), f"{source} → {target}: {tensor!r}"


def test_a_step_is_sent_only_what_the_ensemble_maps_to_it() -> None:
    arrows = ARROW.findall(architecture.diagram(architecture.configs()))
    into = {target: carried for _, carried, target in arrows if target.startswith("tap")}
    assert len(into) == 6
    assert all("<br/>" not in carried for carried in into.values())
    assert ("caller", "qwen_scorer_3") not in {(source, target) for source, _, target in arrows}


def test_the_calls_of_every_python_model_are_drawn() -> None:
    models = architecture.configs()
    drawn = {}
    for caller, carried, called in ARROW.findall(architecture.calls_diagram(models)):
        drawn.setdefault(caller, {})[called] = carried
    networks = {f"osediff_{part}" for part in ("tagger", "text_encoder", "unet")}
    networks |= {"osediff_vae_encoder", "osediff_vae_decoder"}
    assert drawn.keys() == {"osediff", "panorama_stream", "qwen", "qwen_describer", "qwen_scorer"}
    assert drawn["osediff"].keys() == networks
    stages = {"preprocess", "qwen_scorer", "qwen_describer", "interpolate"}
    assert drawn["panorama_stream"].keys() == networks | stages
    # It draws the cameras itself and sends no seed on.
    assert "GIVEN_CAMERAS" in drawn["panorama_stream"]["preprocess"]
    assert "SEED" not in drawn["panorama_stream"]["preprocess"]
    assert drawn["qwen_scorer"].keys() == drawn["qwen_describer"].keys() == {"qwen"}


def test_a_call_is_found_through_what_a_model_imports() -> None:
    assert calls("qwen_scorer", {"qwen", "tap"})[0] == ["qwen"]  # by requests.ask_qwen
    assert calls("preprocess", {"qwen", "tap"})[0] == []  # which imports other names of requests
