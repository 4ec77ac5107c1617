"""Super-resolution networks as values: which models play their roles, and what tells that."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from panotriton.errors import ServerStartError
from panotriton.models.one_step import read_network
from panotriton.models.osediff import one_step, plan_size
from panotriton.pipeline.networks import NETWORKS, OSEDIFF, PIPELINE, Roles, fronts
from panotriton.pipeline.stages import STAGES
from panotriton_export.front import front_folders, write_settings

MODELS = Path(__file__).parent.parent.parent / "model_repository"
CONFIGS = {
    path.parent.name: text_format.Parse(path.read_text(), ModelConfig())
    for path in MODELS.glob("*/config.pbtxt")
}
SETTINGS = {
    "alpha_cumprod": 0.0046601,
    "latent_channels": 4,
    "latent_overlap": 32,
    "latent_tile": 96,
    "precision": "fp32",
    "process_size": 512,
    "vae_scale_factor": 8,
    "weights_sha256": "0" * 64,
}
TENSORS = {
    "text_encoder": ({"INPUT_IDS": "INT64"}, {"PROMPT_EMBEDS": "FP32"}),
    "encoder": ({"IMAGE": "UINT8"}, {"LATENT": "FP32"}),
    "denoiser": ({"LATENT": "FP32", "PROMPT_EMBEDS": "FP32"}, {"NOISE": "FP32"}),
    "decoder": ({"LATENT": "FP32"}, {"IMAGE": "UINT8"}),
    "tagger": ({"IMAGE": "UINT8"}, {"PROBABILITY": "FP32"}),
}


def written(folder: Path, content: Any) -> Path:
    (folder / "osediff.json").write_text(json.dumps(content))
    return folder


def test_settings_without_names_mean_the_names_of_before(tmp_path: Path) -> None:
    network = read_network(written(tmp_path, SETTINGS), "osediff")
    assert network.roles.models == (
        "osediff_tagger",
        "osediff_text_encoder",
        "osediff_vae_encoder",
        "osediff_unet",
        "osediff_vae_decoder",
    )


def test_the_settings_name_the_models(tmp_path: Path) -> None:
    names = {role: f"my_{role}" for role in asdict(OSEDIFF)}
    network = read_network(written(tmp_path, SETTINGS | {"models": names}), "osediff")
    assert network.roles == Roles(**names)
    del names["tagger"]
    network = read_network(written(tmp_path, SETTINGS | {"models": names}), "osediff")
    assert network.roles.models == network.roles.required
    assert network.roles.tagger is None


def test_osediffs_arithmetic_is_that_of_its_settings(tmp_path: Path) -> None:
    network = read_network(written(tmp_path, SETTINGS | {"process_size": 64}), "osediff")
    assert (network.channels, network.latent_px, network.tile, network.overlap) == (4, 8, 96, 32)
    assert network.plan(20, 50, 2) == plan_size(20, 50, 2, 64) != plan_size(20, 50, 2)
    z, eps = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(network.step(z, eps), one_step(z, eps, 0.0046601))


def test_what_an_export_writes_reads_back(tmp_path: Path) -> None:
    folders = front_folders(tmp_path, "osediff")
    assert [folder.parent.name for folder in folders] == ["osediff", "panorama_stream"]
    for folder in folders:
        write_settings(folder, "osediff", SETTINGS)
        assert [path.name for path in folder.iterdir()] == ["osediff.json"]
        content = json.loads((folder / "osediff.json").read_text())
        assert content == SETTINGS | {"models": asdict(OSEDIFF)}
        assert read_network(folder, "osediff").roles == OSEDIFF


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in SETTINGS.items() if name != key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without("alpha_cumprod"), r"osediff\.json is not as .*'alpha_cumprod'.*export .* again"),
        (without("latent_tile"), r"osediff\.json is not as .*'latent_tile'.*export .* again"),
        (SETTINGS | {"models": {"encoder": "e"}}, "missing 3 required .*'text_encoder'"),
        (SETTINGS | {"models": asdict(OSEDIFF) | {"unet": "u"}}, "unexpected .*'unet'"),
        ([], r"osediff\.json is not as the export of osediff writes it"),
    ],
)
def test_settings_that_are_not_the_networks_are_refused(
    tmp_path: Path, content: Any, message: str
) -> None:
    with pytest.raises(ServerStartError, match=message):
        read_network(written(tmp_path, content), "osediff")


def test_files_that_are_no_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match="FileNotFoundError.*export the network again"):
        read_network(tmp_path, "osediff")
    (tmp_path / "osediff.json").write_text("{")
    with pytest.raises(ServerStartError, match="JSONDecodeError.*export the network again"):
        read_network(tmp_path, "osediff")


@pytest.mark.parametrize("name", ["absent", "tiles"])
def test_a_network_without_arithmetic_is_named(tmp_path: Path, name: str) -> None:
    expected = rf"'{name}'; expected a class Network in panotriton\.models\.{name}$"
    with pytest.raises(ServerStartError, match=expected):
        read_network(tmp_path, name)


def test_parts_are_what_a_model_calls() -> None:
    assert STAGES["osediff"] == OSEDIFF.models
    assert STAGES["qwen_scorer"] == STAGES["qwen_describer"] == ("qwen",)
    assert STAGES["select"] == ()


@pytest.mark.parametrize("network", NETWORKS)
def test_the_repository_has_a_model_for_each_role(network: str) -> None:
    for role, model in asdict(NETWORKS[network]).items():
        if model is not None:
            config = CONFIGS[model]
            found = tuple(
                {io.name: DataType.Name(io.data_type).removeprefix("TYPE_") for io in ios}
                for ios in (config.input, config.output)
            )
            assert found == TENSORS[role]


@pytest.mark.parametrize("network", NETWORKS)
def test_fronts_are_the_models_whose_configs_name_the_network(network: str) -> None:
    named = {
        name
        for name, config in CONFIGS.items()
        if config.parameters["network"].string_value == network
    }
    assert named == set(fronts(network))


def test_the_pipelines_network_is_the_one_that_the_ensemble_asks() -> None:
    steps = {step.model_name for step in CONFIGS["panorama"].ensemble_scheduling.step}
    assert steps & set(NETWORKS) == {PIPELINE}
