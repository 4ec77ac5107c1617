"""Another one-step network under other names, through the code that runs OSEDiff, unchanged."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import panotriton.models
from panotriton import Client
from panotriton.local import Upscaler
from panotriton.pipeline.networks import NETWORKS
from tests.brief import BriefServer
from tests.server import toysr

# Too large for one tile, and with sides that the network has to round down.
SIZE = (51, 70)
PAD = "[PAD]"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An interpreter that knows the toy's arithmetic, and the folder of models that holds it."""
    return toysr.install(tmp_path_factory.mktemp("environment"))


@pytest.fixture
def toy_repository(tmp_path: Path) -> Path:
    return toysr.build(tmp_path / "repository")


@pytest.fixture
def registered(installed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this process: the new file is found, and the new entry is there."""
    folders = [*panotriton.models.__path__, str(installed[1])]
    monkeypatch.setattr(panotriton.models, "__path__", folders)
    monkeypatch.setitem(NETWORKS, "toysr", toysr.ROLES)
    yield
    sys.modules.pop("panotriton.models.toysr", None)


def images() -> np.ndarray:
    """A red one and a green one, (2, h, w, 3), with something to see in them."""
    noise = np.random.default_rng(0).integers(0, 60, (2, *SIZE, 3), np.uint8)
    noise[0, ..., 0] += 140
    noise[1, ..., 1] += 140
    return noise


def assert_near(got: np.ndarray, expected: np.ndarray) -> None:
    """Within a grey level: fp32, truncated."""
    assert got.shape == expected.shape == (100, 140, 3)
    assert np.abs(got - expected).max() <= 1


@pytest.mark.usefixtures("registered")
def test_it_runs_in_this_process(toy_repository: Path) -> None:
    upscaler = Upscaler(toy_repository, network="toysr", threads=1)
    for image, tag in zip(images(), ("red", "green"), strict=True):
        sharp = upscaler.upscale(image, align="nofix", prompt="calm")
        assert sharp.model == "toysr"
        assert_near(sharp.numpy(), toysr.expected(image, [tag, ",", "calm", ",", PAD]))


@pytest.mark.usefixtures("registered")
def test_it_runs_without_its_tagger(toy_repository: Path) -> None:
    for path in toy_repository.glob("toysr_colour/**/*.*"):
        path.unlink()
    for folder in ("toysr_colour/1", "toysr_colour"):
        (toy_repository / folder).rmdir()
    (toy_repository / "toysr" / "1" / "tags.json").unlink()
    (image, _) = images()
    sharp = Upscaler(toy_repository, network="toysr", threads=1).upscale(image, align="nofix")
    assert_near(sharp.numpy(), toysr.expected(image, [PAD] * 5))


def test_it_runs_behind_a_server(
    installed: tuple[Path, Path], toy_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(installed[0]))  # the models run in this one's Python
    inputs = {
        "IMAGES": images(),
        "ALIGN": np.array([b"nofix"], np.object_),
        "PROMPT": np.array([b"calm"], np.object_),
    }
    with BriefServer(toy_repository) as server, Client(server.grpc_url) as client:
        sharp = client.infer("toysr", inputs, ["IMAGES_SR"])["IMAGES_SR"]
        stages = client.statistics()
    for got, image, tag in zip(sharp, images(), ("red", "green"), strict=True):
        assert_near(got, toysr.expected(image, [tag, ",", "calm", ",", PAD]))
    assert all(stages[model].inferences >= 2 for model in toysr.ROLES.models)
