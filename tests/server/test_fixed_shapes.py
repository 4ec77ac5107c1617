"""Networks of fixed shapes in a real server: images of several sizes at once, on the CPU in a GPU's place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from panotriton import Client
from panotriton.local import Upscaler
from panotriton.models.input_shapes import input_shapes
from panotriton.models.one_step import read_network
from panotriton.models.super_resolution import Limits
from panotriton.pipeline.networks import NETWORKS
from panotriton.pipeline.sizes import ImageSize
from panotriton.server.engines import CPU, CUDA
from panotriton.server.launch import LocalServer
from panotriton_export.configs import set_engine, set_instances
from tests.brief import BriefServer
from tests.repositories import with_settings

# As for a GPU, backend name included, with an engine that this machine has.
SHAPED = replace(
    CPU,
    fixed_batches=CUDA.fixed_batches,
    shape_entries=CUDA.shape_entries,
    backend=CUDA.backend,
)
# Latents of 2 px in tiles of 96: two sizes are whole, the others make 2, 4 and 6 tiles.
TILED = {"process_size": 64, "latent_tile": 96, "latent_overlap": 32}
SIZES = ((44, 44), (54, 64), (96, 134), (100, 104), (100, 188))


@pytest.fixture(scope="module")
def tiled(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small preset, whose smaller tiles take a ninth of the time."""
    return with_settings(repository, tmp_path_factory.mktemp("tiled"), **TILED)


@pytest.fixture(scope="module")
def server(tiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("shaped")
    network = read_network(tiled / "osediff" / "1", "osediff")
    sizes = [ImageSize(*size) for size in SIZES]
    expected = input_shapes(network, Limits(), sizes)
    for name in ("osediff", *NETWORKS["osediff"].required):
        (folder / name).mkdir()
        (folder / name / "1").symlink_to((tiled / name / "1").resolve())
        (folder / name / "config.pbtxt").write_text((tiled / name / "config.pbtxt").read_text())
        if name != "osediff":
            set_engine(folder / name, SHAPED, "fp32", expected.get(name, ()))
            set_instances(folder / name, 1)  # sessions are counted
    with BriefServer(folder) as running:
        yield running


def opened(server: LocalServer) -> set[tuple[str, str]]:
    """(instance, shapes) of the sessions that were opened at load, from the log."""
    return set(re.findall(r"(osediff_\w+): (\w+ [\dx, \w]+) opened and run", server.log_text()))


def late(server: LocalServer) -> list[tuple[str, str]]:
    """(model, shapes) of those opened since."""
    return re.findall(r"(osediff_\w+): (\w+ [\dx, \w]+): not an expected", server.log_text())


def test_ten_images_of_five_sizes_open_nothing_that_was_not_open_at_load(
    server: LocalServer, tiled: Path
) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3), np.uint8) for size in SIZES * 2]
    order = random.permutation(len(images))
    before = opened(server)
    with Client(server.grpc_url) as client, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(client.upscale, [images[i] for i in order]))
    assert late(server) == []
    assert opened(server) == before
    here = Upscaler(tiled, providers=["CPUExecutionProvider"])
    for index, answer in list(zip(order, answers, strict=True))[:5]:
        expected = here.upscale(images[index]).numpy().astype(int)
        assert np.abs(answer.numpy() - expected).max() <= 1


def test_as_many_sessions_as_shapes(server: LocalServer) -> None:
    shapes: dict[str, set[str]] = {}
    for instance, shape in opened(server):
        shapes.setdefault(re.sub(r"_\d+_\d+$", "", instance), set()).add(shape)
    assert {model: len(found) for model, found in shapes.items()} == {
        "osediff_text_encoder": 2,  # batches of 1 and 4
        "osediff_vae_encoder": 5,
        "osediff_unet": 9,  # two whole latents and one tile, batches of 1, 4 and 8
        "osediff_vae_decoder": 5,
    }
    assert any("LATENT 8x8x96x96" in shape for shape in shapes["osediff_unet"])


def test_another_size_works_and_says_so_once_for_each_network(server: LocalServer) -> None:
    image = np.full((46, 50, 3), 90, np.uint8)
    with Client(server.grpc_url) as client:
        first, second = (client.upscale(image).numpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)
    found = late(server)
    assert len(found) == len(set(found))
    assert {model for model, _ in found} == {
        "osediff_vae_encoder",
        "osediff_unet",
        "osediff_vae_decoder",
    }
