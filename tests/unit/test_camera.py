import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from panotriton.pipeline.camera import (
    CAMERA_FIELDS,
    LIMITS,
    Camera,
    Sphere,
    crop,
    interval_bounds,
    lerp,
    rotation,
    sample_cameras,
)

DATA = Path(__file__).parent.parent / "data"


def panorama(name: str) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(DATA / "panoramas" / f"{name}.jpg")), cv2.COLOR_BGR2RGB)


@pytest.mark.parametrize("name", ["city", "forest"])
def test_crops_match_the_golden_ones(name: str) -> None:
    golden = np.load(DATA / "golden" / f"crops_{name}.npz")
    sphere = Sphere(panorama(name))
    for expected, fields in zip(golden["crops"], json.loads(str(golden["cameras"])), strict=True):
        view = sphere.crop(Camera(**{field: fields[field] for field in CAMERA_FIELDS}))
        difference = np.abs(view.astype(np.int16) - expected).mean()
        assert difference <= 1.0, f"{fields}: mean absolute difference {difference:.3f}"


def test_many_crops_in_threads_equal_single_ones() -> None:
    image = panorama("city")
    cameras = [Camera.from_array(row) for row in sample_cameras(3)[0].reshape(-1, 5)]
    pairs = np.zeros((len(cameras), 128, 256, 3), np.uint8)
    views = [pair[:, 128:] for pair in pairs]  # halves of a larger array, written in place
    Sphere(image, 128).crops(cameras, views, threads=3)
    for camera, view in zip(cameras, views, strict=True):
        np.testing.assert_array_equal(view, crop(image, camera, 128))
    assert not pairs[:, :, :128].any()


def test_a_crop_ahead_shows_the_middle_of_the_panorama() -> None:
    image = np.zeros((512, 512, 3), np.uint8)
    image[200:312, 200:312] = 255
    view = crop(image, Camera(0, 0, 0, 60, 0))
    assert view[256, 256].tolist() == [255, 255, 255]


def test_the_same_seed_gives_the_same_bits_in_another_process() -> None:
    here = sample_cameras(20).tobytes().hex()
    code = "import panotriton as p; print(p.sample_cameras(20).tobytes().hex())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here
    assert sample_cameras(21).tobytes().hex() != here


@given(st.integers(0, 2**63 - 1))
def test_sampled_cameras_obey_the_rules(seed: int) -> None:
    cameras = sample_cameras(seed)
    left_1, left_2, right = cameras[0, :, 0], cameras[1, :, 0], cameras[0, :, 1]
    np.testing.assert_array_equal(right, cameras[1, :, 1])  # one right camera for both panoramas
    for k in range(8):
        low, high = interval_bounds(k + 1)
        assert low <= right[k, 0] <= high
        assert left_1[k, 0] == left_2[k, 0] == right[k, 0]
    for f, (low, high) in enumerate(LIMITS.values()):
        assert cameras[..., f].min() >= low
        assert cameras[..., f].max() <= high
    pitch, roll, vfov, xi = 1, 2, 3, 4
    assert np.abs(left_1 - right)[:, [pitch, vfov]].max() <= 40
    assert np.abs(left_2 - left_1)[:, [pitch, roll, vfov]].max() <= 20
    assert np.abs(left_2 - left_1)[:, xi].max() <= 0.2


def test_samples_fill_the_whole_range() -> None:
    cameras = np.stack([sample_cameras(seed)[0] for seed in range(200)])  # (200, 8, 2, 5)
    for f, name in enumerate(CAMERA_FIELDS[1:], start=1):
        low, high = LIMITS[name]
        share = (cameras[:, :, 1, f] - low) / (high - low)  # right cameras are uniform
        assert abs(share.mean() - 0.5) < 0.03, name
        assert abs(share.std() - 12**-0.5) < 0.02, name


@given(st.floats(0, 1))
def test_lerp_stays_between_its_ends(w: float) -> None:
    a, b = Camera(180, 90, -90, 140, 1), Camera(180, -90, -90, 30, 0.1)
    between = lerp(a, b, w)
    assert between.yaw == 180  # never 180.00000000000003, which no camera accepts
    np.testing.assert_allclose(
        between.to_array(), (1 - w) * a.to_array() + w * b.to_array(), atol=1e-9
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("yaw", 181), ("pitch", -91), ("roll", 90.5), ("vfov", 0), ("xi", 1.1), ("xi", float("nan"))],
)
def test_a_bad_camera_names_its_field_and_limits(field: str, value: float) -> None:
    fields = {"yaw": 0, "pitch": 0, "roll": 0, "vfov": 90, "xi": 0, field: value}
    low, high = LIMITS[field]
    with pytest.raises(ValueError, match=rf"{field} is .*{low:g} to {high:g}"):
        Camera(**fields)


@pytest.mark.parametrize(
    "image",
    [np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3)), np.zeros((0, 64, 3), np.uint8)],
)
def test_crop_refuses_what_is_no_panorama(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="panorama is"):
        crop(image, Camera(0, 0, 0, 90, 0))


NAMES = ["city", "courtyard", "forest", "interior", "sunrise", "sunset"]
VIEWS = {
    "ahead": Camera(20, 0, 0, 70, 0.3),
    "seam": Camera(179, 5, 10, 90, 0.5),
    "up": Camera(10, 85, 0, 90, 0),
    "down": Camera(-170, -80, 30, 60, 0.8),
}


def supersampled(
    image: np.ndarray, camera: Camera, size: int, rows: slice = slice(0, None)
) -> np.ndarray:
    """Those rows of a view: means of 4 × 4 bilinear samples inside each pixel, float64 (R, size, 3)."""
    height, width = image.shape[:2]
    beyond = [row[:, (np.arange(width) + width // 2) % width] for row in (image[:1], image[-1:])]
    whole = np.concatenate([beyond[0], image, beyond[1]]).astype(np.float64)
    whole = np.concatenate([whole[:, -1:], whole, whole[:, :1]], axis=1)  # padded by 1 px
    half = np.sin(np.radians(camera.vfov) / 2)
    focal = size / 4 * (camera.xi + np.sqrt(1 - half**2)) / half
    steps = ((np.arange(4 * size) + 0.5) / 4 - 0.5 - size / 2).reshape(size, 4) / focal
    x, y = np.meshgrid(steps.ravel(), -steps[rows].ravel())
    r2 = x**2 + y**2
    a = (camera.xi + np.sqrt(1 + (1 - camera.xi**2) * r2)) / (r2 + 1)
    x, y, z = np.moveaxis(np.stack([x * a, y * a, a - camera.xi], -1) @ rotation(camera).T, -1, 0)
    column = (np.arctan2(x, z) + np.pi) / (2 * np.pi) * width + 0.5
    row = (np.pi / 2 - np.arctan2(y, np.hypot(x, z))) / np.pi * height + 0.5
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    right, below = (column - left)[..., None], (row - top)[..., None]
    above = whole[top, left] * (1 - right) + whole[top, left + 1] * right
    under = whole[top + 1, left] * (1 - right) + whole[top + 1, left + 1] * right
    samples = above * (1 - below) + under * below
    return samples.reshape(-1, 4, size, 4, 3).mean(axis=(1, 3))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one - other) ** 2)))


@pytest.mark.parametrize("name", NAMES)
def test_a_sphere_of_the_panoramas_own_resolution_is_sharp_and_not_aliased(name: str) -> None:
    image = panorama(name)
    sphere = Sphere(image, 512, sphere_size=0)
    rows = slice(0, None, 16)  # of 512; the whole view takes a second
    for view, camera in VIEWS.items():
        expected = supersampled(image, camera, 512, rows)
        quality = psnr(sphere.crop(camera)[rows], expected)
        assert quality >= 38, f"{view}: {quality:.1f} dB"
        plain = psnr(crop(image, camera)[rows], expected)
        assert quality > plain, f"{view}: {quality:.1f} dB, without it {plain:.1f}"


def test_footprints_of_many_pixels_and_none() -> None:
    """Fine noise seen from afar is its mean; seen closely, its pixels."""
    image = np.random.default_rng(0).integers(0, 256, (512, 1024, 3), np.uint8)
    wide = Sphere(image, 64, sphere_size=0).crop(Camera(0, 0, 0, 140, 0))[24:40, 24:40]
    assert wide.std() < 12  # a sample alone has 74
    camera = Camera(0, 0, 0, 30, 0)
    close = Sphere(image, 512, sphere_size=0).crop(camera)
    rows = slice(0, None, 16)
    assert psnr(close[rows], supersampled(image, camera, 512, rows)) > 38


@pytest.mark.parametrize("name", NAMES)
def test_the_seam_is_as_any_other_place(name: str) -> None:
    image = panorama(name)
    turned = np.roll(image, 512, axis=1)  # by half of its 1024 columns
    across = Sphere(image, 512, sphere_size=0).crop(Camera(180, 0, 0, 60, 0))
    within = Sphere(turned, 512, sphere_size=0).crop(Camera(0, 0, 0, 60, 0))
    assert np.abs(across.astype(np.int16) - within).max() <= 1
    steps = np.abs(np.diff(across.astype(np.int16), axis=1)).mean(axis=(0, 2))  # column to column
    assert steps[254:258].max() <= steps.max(initial=0, where=np.abs(np.arange(511) - 255.5) > 2)


@pytest.mark.parametrize("pitch", [90, -90])
def test_the_poles_have_no_spokes(pitch: int) -> None:
    """A turn about the axis of the pole turns the view, to its very middle."""
    sphere = Sphere(panorama("forest"), 256, sphere_size=0)
    one, other = (sphere.crop(Camera(yaw, pitch, 0, 60, 0)) for yaw in (0, 180))
    middle = np.s_[1:, 1:]  # the axis goes through pixel 128
    turned = one[middle][::-1, ::-1]
    assert psnr(turned.astype(float), other[middle]) > 38


@pytest.mark.parametrize("shape", [(64, 33_000), (33_000, 64)])
def test_a_panorama_that_opencv_cannot_sample_whole_is_shrunk(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), (200, 100, 50), np.uint8)
    view = Sphere(image, 64, 0).crop(VIEWS[next(iter(VIEWS))])
    assert np.abs(view.astype(np.int16) - image[0, 0]).max() <= 1


@pytest.mark.parametrize("shape", [(100, 100), (65, 301), (200, 64)])
@pytest.mark.parametrize("sphere_size", [0, 300])
def test_spheres_of_any_shape_keep_the_colours(shape: tuple[int, int], sphere_size: int) -> None:
    image = np.full((*shape, 3), (200, 100, 50), np.uint8)
    sphere = Sphere(image, 64, sphere_size)
    assert sphere.image.shape[:2] == ((sphere_size, sphere_size) if sphere_size else shape)
    for camera in VIEWS.values():
        view = sphere.crop(camera)
        assert np.abs(view.astype(np.int16) - image[0, 0]).max() <= 1


@pytest.mark.parametrize("size", [64, 200])
def test_a_sphere_of_the_crops_size_is_the_default(size: int) -> None:
    image, camera = panorama("city"), VIEWS["seam"]
    expected = crop(image, camera, size)
    np.testing.assert_array_equal(crop(image, camera, size, sphere_size=size), expected)
    assert (crop(image, camera, size, sphere_size=0) != expected).any()


@pytest.mark.parametrize("size", [64, 65, 127, 128, 129, 130, 257, 385])
def test_a_sharp_crop_may_have_any_size(size: int) -> None:
    """Those that leave one pixel over when they are cut into blocks, too."""
    grey = np.full((64, 128, 3), 90, np.uint8)
    assert (crop(grey, Camera(30, 10, 0, 90, 0.4), size, sphere_size=0) == 90).all()
