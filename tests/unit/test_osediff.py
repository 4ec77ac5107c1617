import numpy as np
import pytest
import torch

from panotriton.errors import InvalidInput
from panotriton.models.colours import align_colours
from panotriton.models.osediff import one_step, plan_size
from panotriton.models.tiles import TileBlend, windows
from panotriton.pipeline.contract import TENSORS, Options

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("size", "upscale", "network", "output"),
    [
        ((512, 1024), 2, (1024, 2048), (1024, 2048)),
        ((512, 512), 1, (512, 512), (512, 512)),
        ((300, 301), 2, (600, 600), (600, 600)),  # 602 is rounded down to a multiple of 8
        ((100, 200), 2, (512, 1024), (200, 400)),  # short side raised to 256, result brought back
        ((130, 97), 4, (680, 512), (520, 388)),
        ((512, 768), 3, (1536, 2304), (1536, 2304)),
    ],
)
def test_size_rules(
    size: tuple[int, int], upscale: int, network: tuple[int, int], output: tuple[int, int]
) -> None:
    plan = plan_size(*size, upscale)
    assert (plan.network, plan.output) == (network, output)
    image = RNG.integers(0, 256, (*size, 3), np.uint8)
    prepared = plan.prepare(image)
    assert prepared.shape == (*network, 3)
    assert plan.finish(prepared).shape == (*output, 3)


def test_one_step_has_the_published_coefficients() -> None:
    z, eps = RNG.normal(size=(2, 4, 8, 8)).astype(np.float32)
    expected = 14.6488 * z - 14.6146 * eps
    np.testing.assert_allclose(one_step(z, eps, 0.0046601), expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(4, 128, 256), (4, 97, 97), (4, 200, 64), (4, 128, 128)])
def test_blending_identical_tiles_gives_the_plane_back(shape: tuple[int, int, int]) -> None:
    latent = RNG.normal(size=shape).astype(np.float32)
    blend = TileBlend(shape, tile=96, overlap=32)
    blend.add(blend.cut(latent, blend.positions), blend.positions)
    np.testing.assert_allclose(blend.result(), latent, rtol=1e-4, atol=1e-5)


def test_tile_counts_are_upstreams() -> None:
    assert len(TileBlend((4, 128, 256), 96, 32).positions) == 8  # a pair at upscale 2
    assert len(TileBlend((4, 128, 128), 96, 32).positions) == 4  # an in-between view
    assert TileBlend((4, 128, 256), 96, 32).positions[-1] == (32, 160)  # clamped to the edge
    assert TileBlend((4, 200, 64), 96, 32).tile == 64


@pytest.mark.parametrize(("height", "width"), [(10, 10), (64, 200), (129, 64), (300, 257)])
def test_windows_fade_into_each_other_and_give_the_plane_back(height: int, width: int) -> None:
    plane = RNG.normal(size=(height, width)).astype(np.float32)
    copy = np.zeros_like(plane)
    shapes = set()
    for window in windows(height, width, tile=64, pad=8):
        tile = plane[window.read]
        assert 0 < window.weights.min() <= window.weights.max() <= 1
        copy[window.read] += tile * window.weights
        shapes.add(tile.shape)
    np.testing.assert_allclose(copy, plane, atol=1e-6)
    assert len(shapes) == 1


def test_a_shifted_window_leaves_no_step() -> None:
    """What one tile has more than its neighbour comes in over the overlap, not from a pixel to the next."""
    plane = np.zeros((40, 400), np.float32)
    for shift, window in enumerate(windows(40, 400, tile=100, pad=10)):
        plane[window.read] += 10 * shift * window.weights
    assert plane.max() == pytest.approx(30)
    assert np.abs(np.diff(plane, axis=1)).max() < 10 / 20 * 1.5


def images() -> tuple[np.ndarray, np.ndarray]:
    dark = RNG.integers(0, 120, (48, 64, 3), np.uint8)
    bright = RNG.integers(60, 256, (48, 64, 3), np.uint8)
    return dark, bright


def test_adain_is_its_definition_pixel_by_pixel() -> None:
    image, reference = images()
    x, ref = (torch.from_numpy(i).permute(2, 0, 1).double() / 255 for i in (image, reference))

    def stats(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = t.reshape(3, -1)
        return flat.mean(1)[:, None, None], (flat.var(1) + 1e-5).sqrt()[:, None, None]

    (mean, std), (ref_mean, ref_std) = stats(x), stats(ref)
    moved = ((x - mean) / std * ref_std + ref_mean).clamp(0, 1) * 255
    expected = moved.permute(1, 2, 0).numpy()
    got = align_colours(image, reference, "adain")
    # Truncated, never rounded; at an exact integer the last bit may fall either way.
    assert ((got == np.floor(expected)) | (np.abs(expected - np.rint(expected)) < 1e-4)).all()


def test_wavelet_is_its_definition_pixel_by_pixel() -> None:
    image, reference = images()
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).repeat(3, 1, 1, 1) / 16

    def low(t: torch.Tensor) -> torch.Tensor:
        for level in range(5):
            radius = 2**level
            padded = torch.nn.functional.pad(t, (radius,) * 4, mode="replicate")
            t = torch.nn.functional.conv2d(padded, kernel, groups=3, dilation=radius)
        return t

    x, ref = (torch.from_numpy(i).permute(2, 0, 1)[None].float() / 255 for i in (image, reference))
    expected = ((x - low(x) + low(ref)).clamp(0, 1) * 255)[0].permute(1, 2, 0).numpy()
    got = align_colours(image, reference, "wavelet")
    assert ((got == np.floor(expected)) | (np.abs(expected - np.rint(expected)) < 1e-3)).all()


def test_nofix_changes_nothing_and_others_are_refused() -> None:
    image, reference = images()
    assert align_colours(image, reference, "nofix") is image
    with pytest.raises(InvalidInput, match="ALIGN is 'adian'; expected one of adain, wavelet"):
        Options(align="adian").check(TENSORS)
    with pytest.raises(InvalidInput, match="UPSCALE is 0; expected 1 to 4"):
        Options(upscale=0).check(TENSORS)
