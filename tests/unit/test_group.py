import numpy as np
import pytest

from panotriton.errors import InvalidInput
from panotriton.pipeline.camera import Camera, crop, lerp, sample_cameras
from panotriton.pipeline.contract import Options
from panotriton.pipeline.group import (
    check_cameras,
    crop_between,
    crop_pairs,
    interpolate_cameras,
    interpolate_views,
    make_pairs,
    make_spheres,
)
from panotriton.pipeline.quality import filter_intervals

RNG = np.random.default_rng(0)
PANORAMAS = [RNG.integers(0, 256, (80, 160, 3), np.uint8) for _ in range(2)]
NAN = float("nan")


def test_pairs_are_left_and_right_crops_panorama_by_panorama() -> None:
    cameras = sample_cameras(1)
    pairs, spheres = make_pairs(PANORAMAS, cameras, crop_size=96)
    assert pairs.shape == (16, 96, 192, 3)
    assert spheres.shape == (2, 96, 96, 3)
    for index in (0, 7, 8, 13):
        p, k = divmod(index, 8)
        for side, view in enumerate((pairs[index][:, :96], pairs[index][:, 96:])):
            expected = crop(PANORAMAS[p], Camera.from_array(cameras[p, k, side]), 96)
            np.testing.assert_array_equal(view, expected)


def test_spheres_of_two_sizes_and_again_from_their_images() -> None:
    cameras = sample_cameras(1)
    panoramas = [PANORAMAS[0], PANORAMAS[1][:70, :100]]
    options = Options(crop_size=64, sphere_size=0)
    spheres = make_spheres(panoramas, options)
    assert [sphere.image.shape for sphere in spheres] == [(80, 160, 3), (70, 100, 3)]
    pairs = crop_pairs(spheres, cameras)
    expected = crop(panoramas[1], Camera.from_array(cameras[1, 3, 0]), 64, sphere_size=0)
    np.testing.assert_array_equal(pairs[11][:, :64], expected)
    between = interpolate_cameras(cameras, np.array([5], np.int32), 1)
    again = make_spheres([sphere.image for sphere in spheres], options)
    np.testing.assert_array_equal(crop_between(again, between), crop_between(spheres, between))


@pytest.mark.parametrize("sphere_size", [-1, 1, 63, 8193])
def test_a_sphere_of_no_size_is_refused(sphere_size: int) -> None:
    options = Options(sphere_size=sphere_size)
    with pytest.raises(InvalidInput, match=f"SPHERE_SIZE is {sphere_size}; expected 64 to 8192 px"):
        make_spheres(PANORAMAS, options)


def test_a_sphere_that_is_not_chosen_is_of_the_crops_size() -> None:
    assert "SPHERE_SIZE" not in Options(crop_size=96).tensors()
    assert Options(crop_size=96).completed().tensors()["SPHERE_SIZE"].tolist() == [96]
    assert Options(crop_size=96, sphere_size=0).completed().tensors()["SPHERE_SIZE"].tolist() == [0]


def scores(first: list[float], second: list[float]) -> np.ndarray:
    return np.array(first + second, np.float32)


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ([0.9] * 8, [0.9] * 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        ([0.9] * 8, [0.9, 0.1] * 4, [1, 3, 5, 7]),
        ([0.7] + [0.69] * 7, [1.0] * 8, [1]),  # the threshold itself passes, in float32 too
        ([NAN] * 8, [NAN] * 8, []),
        ([NAN, 0.8, NAN, 0.2] + [0.0] * 4, [0.8, NAN, NAN, NAN] + [0.9] * 4, [1, 2]),
    ],
)
def test_the_lowest_valid_score_decides(
    first: list[float], second: list[float], kept: list[int]
) -> None:
    assert filter_intervals(scores(first, second), 0.7).tolist() == kept


@pytest.mark.parametrize("threshold", [-0.1, 1.5, NAN])
def test_a_threshold_outside_0_to_1_is_refused(threshold: float) -> None:
    with pytest.raises(InvalidInput, match="THRESHOLD is .* expected 0 to 1"):
        filter_intervals(scores([1] * 8, [1] * 8), threshold)


def test_in_between_cameras_and_views() -> None:
    cameras = sample_cameras(5)
    _, spheres = make_pairs(PANORAMAS, cameras, crop_size=64)
    kept = np.array([2, 7], np.int32)
    between = interpolate_cameras(cameras, kept, 3)
    views = interpolate_views(spheres, between)
    assert between.shape == (2, 2, 3, 5)
    assert views.shape == (12, 64, 64, 3)
    left, right = (Camera.from_array(row) for row in cameras[1, 6])
    expected = lerp(left, right, 2 / 4)  # i = 2 of N = 3
    np.testing.assert_array_equal(between[1, 1, 1], expected.to_array())
    np.testing.assert_array_equal(views[(2 * 1 + 1) * 3 + 1], crop(spheres[1], expected, 64))


@pytest.mark.parametrize(("kept", "count"), [([], 9), ([1], 0)])
def test_nothing_to_interpolate_is_no_error(kept: list[int], count: int) -> None:
    between = interpolate_cameras(sample_cameras(5), np.array(kept, np.int32), count)
    views = interpolate_views(np.zeros((2, 64, 64, 3), np.uint8), between)
    assert between.shape == (len(kept), 2, count, 5)
    assert views.shape == (0, 64, 64, 3)


def test_bad_arguments_are_named() -> None:
    cameras = sample_cameras(0)
    with pytest.raises(InvalidInput, match="NUM_INTERPOLATIONS is -1; expected 0 to"):
        interpolate_cameras(cameras, np.array([1], np.int32), -1)
    with pytest.raises(InvalidInput, match=r"KEPT is \[9\]"):
        interpolate_cameras(cameras, np.array([9], np.int32), 1)
    with pytest.raises(InvalidInput, match="expected up to 8 interval ids from 1 to 8"):
        interpolate_cameras(cameras, np.ones(3000, np.int32), 1)
    many = interpolate_cameras(cameras, np.arange(1, 9, dtype=np.int32), 255)
    with pytest.raises(InvalidInput, match="4080 views of 2048 px .* at most 671 megapixels"):
        crop_between(make_spheres(PANORAMAS, Options(crop_size=2048)), many)
    with pytest.raises(InvalidInput, match="CROP_SIZE is 32; expected 64 to 2048"):
        make_pairs(PANORAMAS, cameras, crop_size=32)
    cameras[1, 2, 0, 3] = NAN
    with pytest.raises(InvalidInput, match=r"C\[1, 2, 0\]: camera field vfov is nan"):
        check_cameras("C", cameras)
    with pytest.raises(InvalidInput, match=r"C has shape \(8, 5\)"):
        check_cameras("C", np.zeros((8, 5)))
