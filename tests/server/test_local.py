"""The networks in this process give what they give behind a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panotriton import Client
from panotriton.errors import InvalidInput, ServerStartError
from panotriton.local import Upscaler
from panotriton.server.launch import LocalServer

PANORAMA = Path(__file__).parent.parent / "data" / "panoramas" / "city.jpg"


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """One tile at twice its size, two at three times."""
    with Image.open(PANORAMA) as picture:
        return np.asarray(picture.convert("RGB"))[200:360, 300:556]  # (160, 256, 3)


def test_it_equals_the_server(
    quick_repository: Path, server: LocalServer, image: np.ndarray, tmp_path: Path
) -> None:
    upscaler = Upscaler(quick_repository)
    with Client(server.grpc_url) as client:
        for options in ({}, {"upscale": 3, "align": "wavelet", "prompt": "sky"}):
            here = upscaler.upscale(image, **options)
            there = client.upscale(image, **options)
            assert here.model == there.model
            # Batches of another size sum in another order: one grey level, here and there.
            difference = np.abs(here.numpy().astype(int) - there.numpy())
            assert difference.max() <= 1
            assert (difference > 0).mean() < 1e-3
    path = tmp_path / "image.png"
    here.image.save(path)
    np.testing.assert_array_equal(
        upscaler.upscale(path, upscale=1).numpy(), upscaler.upscale(here.image, upscale=1).numpy()
    )


def test_what_is_wrong_is_named(repository: Path, image: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match="panotriton export"):
        Upscaler(tmp_path)
    upscaler = Upscaler(repository)
    with pytest.raises(InvalidInput, match="UPSCALE is 5"):
        upscaler.upscale(image, upscale=5)
    with pytest.raises(InvalidInput, match="float64"):
        upscaler.upscale(image / 255)


def test_shared_memory_changes_nothing(server: LocalServer) -> None:
    small = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    with Client(server.grpc_url) as client, client.shared_memory(16 << 20) as memory:
        plain, through = client.upscale(small), client.upscale(small, via=memory)
        np.testing.assert_array_equal(plain.numpy(), through.numpy())
        assert 0 <= client.score(plain.image, via=memory).final <= 1
        assert client.describe(plain.image).text
