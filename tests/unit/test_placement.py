"""The text that places networks on other servers, and what a server then needs and loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from panotriton.errors import InvalidInput, RepositoryMissing
from panotriton.pipeline.placement import read_placement
from panotriton.server.contained import main, with_models
from panotriton.server.repository import (
    ALL_EXPORTED,
    EXPORTED_FILES,
    check_exported,
    check_served,
    placed,
    served_here,
)


def test_names_share_addresses_and_a_name_has_several() -> None:
    text = " osediff_unet,osediff_vae_decoder=unet:8001  qwen=10.0.0.7:8001,[fd00::7]:8001,10.0.0.7:8001 "
    assert read_placement(text) == {
        "osediff_unet": ("unet:8001",),
        "osediff_vae_decoder": ("unet:8001",),
        "qwen": ("10.0.0.7:8001", "[fd00::7]:8001"),
    }
    assert read_placement("") == {}


@pytest.mark.parametrize(
    "wrong",
    [
        "qwen",
        "qwen=",
        "=a:1",
        "qwen,=a:1",
        "qwen=a",
        "qwen=a:0",
        "qwen=a:65536",
        "qwen=http://a:8001",
        "qwen=a:8001,",
        "qwen=a:8001/x",
        "qwen=fd00::7:8001",
        "qwen=a:１",
    ],
)
def test_a_wrong_part_is_quoted_with_what_is_expected(wrong: str) -> None:
    with pytest.raises(InvalidInput, match=r"is not NAME\[,NAME\]=HOST:PORT") as caught:
        read_placement(f"osediff_unet=a:8001 {wrong}")
    assert repr(wrong) in str(caught.value)


def test_a_name_is_placed_once() -> None:
    with pytest.raises(InvalidInput, match="qwen is placed twice"):
        read_placement("qwen=a:8001 qwen=b:8001")


def test_only_what_is_asked_by_calls_alone_can_be_elsewhere() -> None:
    assert placed("osediff_unet=a:1") == {"osediff_unet"}
    assert placed("qwen=a:1") == {"qwen", "qwen_vision", "qwen_vllm"}
    for step in ("qwen_scorer", "osediff", "panorama", "unknown"):
        with pytest.raises(InvalidInput, match=f"'{step}' cannot be placed .* osediff_unet"):
            placed(f"{step}=a:1")


def exported(folder: Path) -> Path:
    for path in EXPORTED_FILES:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
        (folder / path.partition("/")[0] / "config.pbtxt").touch()
    return folder


def test_a_server_needs_no_files_of_what_is_elsewhere(tmp_path: Path) -> None:
    repository = exported(tmp_path)
    (repository / "osediff_unet" / "1" / "model.onnx").unlink()
    with pytest.raises(RepositoryMissing, match="osediff_unet"):
        check_exported(repository)
    check_exported(repository, elsewhere=placed("osediff_unet=a:1"))
    with pytest.raises(RepositoryMissing, match="osediff_unet"):
        check_exported(repository, elsewhere=placed("qwen=a:1"))
    check_exported(repository, elsewhere=ALL_EXPORTED - {"qwen"})


def test_half_a_tagger_counts_where_the_tagger_is(tmp_path: Path) -> None:
    repository = exported(tmp_path)
    (repository / "osediff" / "1" / "tags.json").touch()
    with pytest.raises(RepositoryMissing, match="tagger"):
        check_exported(repository)
    check_exported(repository, elsewhere=placed("osediff_tagger=a:1"))


def test_models_asked_for_must_be_there(tmp_path: Path) -> None:
    repository = exported(tmp_path)
    check_served(repository, ["osediff_unet"])
    with pytest.raises(InvalidInput, match=r"no model 'unet'; expected osediff, .*osediff_unet"):
        check_served(repository, ["unet"])


def test_a_container_loads_all_but_what_is_elsewhere(tmp_path: Path) -> None:
    repository = exported(tmp_path)
    command = ["tritonserver", f"--model-repository={repository}", "--load-model=*", "--x"]
    assert with_models(command, "") == command
    loads = [f"--load-model={name}" for name in served_here(repository, ["osediff_unet"])]
    assert "--load-model=osediff_unet" not in loads
    assert len(loads) > 5
    assert with_models(command, "osediff_unet=a:1") == [*command[:2], *loads, "--x"]
    named = [*command[:2], "--load-model=osediff", "--x"]
    assert with_models(named, "osediff_unet=a:1") == named


def test_what_only_a_named_model_asks_is_loaded_with_it(tmp_path: Path) -> None:
    repository = exported(tmp_path)
    command = ["tritonserver", f"--model-repository={repository}", "--load-model=qwen"]
    assert with_models(command, "") == command
    (repository / "qwen_vision").mkdir()
    (repository / "qwen_vision" / "config.pbtxt").touch()
    assert with_models(command, "") == [*command, "--load-model=qwen_vision"]


def test_a_container_says_what_is_wrong_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"PANOTRITON_HTTP_PORT": "0", "PANOTRITON_HOST": "", "PANOTRITON_HTTP_HOST": ""}
    store = ["tritonserver", "--model-repository=s3://bucket/models", "--load-model=*"]
    for place, says in (("qwen", "is not NAME"), ("qwen=a:1", "PANOTRITON_LOAD_MODELS")):
        assert main(store, environment | {"PANOTRITON_PLACE": place}) == 2
        assert says in capsys.readouterr().err
