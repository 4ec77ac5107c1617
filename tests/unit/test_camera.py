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
