"""The report without a browser: footprints, escaping, self-containment and size."""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panotriton.cli import report as command
from panotriton.errors import InvalidImage, InvalidInput
from panotriton.groups import report
from panotriton.groups.report import page, write_index, write_report
from panotriton.groups.report.footprint import HEIGHT, WIDTH, border, footprint, interval_x, rings
from panotriton.groups.report.picture import bicubic, data_uri, most_different
from panotriton.groups.report.record import read_record
from panotriton.pipeline.camera import LIMITS, Camera, Maps, rotation, sample_cameras
from tests.groups import write_example

NAN = float("nan")
SCORES = [0.9, 0.5, 0.9, NAN, 0.9, 0.9, 0.6, 0.9, 0.8, 0.9, 0.9, NAN, 0.9, NAN, 0.9, 0.71]
KEPT = [1, 3, 5, 6, 8]
SCALE = 2  # mask pixels per degree

CAMERAS = st.builds(Camera, **{name: st.floats(*limits) for name, limits in LIMITS.items()})
HARD_CAMERAS = {
    "straight up": Camera(30, 90, 20, 60, 0.0),
    "straight down": Camera(-180, -90, 0, 140, 0.3),
    "across the seam": Camera(179, 0, 45, 60, 0.5),
    "both poles": Camera(0, 0, 0, 140, 1.0),
    "narrow": Camera(-90, 10, -90, 30, 0.0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("out"), SCORES, KEPT)


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_public_names_are_pinned() -> None:
    assert report.__all__ == ["write_index", "write_report"]


# Footprints


@settings(max_examples=60, deadline=None)
@given(CAMERAS)
def test_the_border_is_the_rim_of_the_sampling_maps(camera: Camera) -> None:
    size = 64
    x, y = Maps(size).at(camera)
    rim = [(0, slice(0, -1)), (slice(0, -1), -1), (-1, slice(None, 0, -1)), (slice(None, 0, -1), 0)]
    expected_x = np.concatenate([x[where] for where in rim]) / (size - 1) * WIDTH
    expected_y = np.concatenate([y[where] for where in rim]) / (size - 1) * HEIGHT
    points = border(camera, size, per_side=size - 1)
    across = np.radians(points[:, 0] - expected_x)
    away_from_poles = np.sin(np.radians(points[:, 1]))  # where a degree of yaw is a small distance
    assert np.abs(points[:, 1] - expected_y).max() < 0.1
    assert np.degrees(np.abs(np.sin(across / 2)) * 2 * away_from_poles).max() < 0.1


@settings(max_examples=40, deadline=None)
@given(CAMERAS)
def test_the_area_is_what_the_camera_sees(camera: Camera) -> None:
    assert disagreement(camera) < 0.01


@settings(max_examples=60, deadline=None)
@given(CAMERAS)
def test_an_outline_has_no_gap(camera: Camera) -> None:
    _, outline = rings(camera)
    for line in outline:
        turns, drop = (line[-1] - line[0]) / (WIDTH, 1)
        assert abs(drop) < 0.01
        assert abs(turns) < 0.001 or abs(abs(turns) - 3) < 0.001  # a ring, or thrice round a pole
    assert footprint(camera).outline.count("Z") == (0 if abs(turns) > 1 else len(outline))


@pytest.mark.parametrize("camera", HARD_CAMERAS.values(), ids=HARD_CAMERAS)
def test_the_area_is_right_at_poles_and_seam(camera: Camera) -> None:
    assert disagreement(camera) < 0.01


@pytest.mark.parametrize("camera", HARD_CAMERAS.values(), ids=HARD_CAMERAS)
def test_every_sample_of_the_crop_lies_in_the_area(camera: Camera) -> None:
    x, y = (plane / 255 for plane in Maps(256).at(camera))
    columns = np.clip(x * WIDTH * SCALE, 0, WIDTH * SCALE - 1).astype(int)
    rows = np.clip(y * HEIGHT * SCALE, 0, HEIGHT * SCALE - 1).astype(int)
    assert drawn(camera)[rows, columns].mean() > 0.985  # the rest is the rim itself


def test_a_camera_looks_into_its_yaw_intervals_band() -> None:
    for seed in range(5):
        for interval, (left, right) in enumerate(sample_cameras(seed)[0], start=1):
            west, east = interval_x(interval)
            assert east - west == 45
            for values in (left, right):
                camera = Camera.from_array(values)
                ahead = rotation(camera) @ [0.0, 0.0, 1.0]
                assert west < 180 + np.degrees(np.arctan2(ahead[0], ahead[2])) < east


def test_paths_are_svg() -> None:
    shape = footprint(HARD_CAMERAS["both poles"])
    number = r"-?\d+(\.\d)?"
    assert re.fullmatch(rf"(M{number} {number}(L{number} {number})+Z)+", shape.area)
    assert shape.area.startswith("M-1 -1L361 -1")  # everything but the hole behind the camera
    assert not footprint(HARD_CAMERAS["straight up"]).outline.endswith("Z")


def disagreement(camera: Camera) -> float:
    """The share of the sphere on which the drawn area and the camera model disagree."""
    rows, columns = np.mgrid[0 : HEIGHT * SCALE, 0 : WIDTH * SCALE]
    yaw, pitch = (
        np.radians((columns + 0.5) / SCALE - 180),
        np.radians(90 - (rows + 0.5) / SCALE),
    )
    wrong = drawn(camera) != seen(camera, yaw, pitch)
    return float((wrong * np.cos(pitch)).sum() / np.cos(pitch).sum())


def drawn(camera: Camera) -> np.ndarray:
    mask = np.zeros((int(HEIGHT * SCALE), int(WIDTH * SCALE)), np.uint8)
    area, _ = rings(camera)
    shapes = [np.round((ring * SCALE - 0.5) * 16).astype(np.int32) for ring in area]
    cv2.fillPoly(mask, shapes, 1, shift=4)
    return mask.astype(bool)


def seen(camera: Camera, yaw: np.ndarray, pitch: np.ndarray, size: int = 512) -> np.ndarray:
    """The camera model the other way round: which directions fall on the picture."""
    rays = np.stack([np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)])
    px, py, pz = np.tensordot(rotation(camera).T, rays, 1)
    half = np.sin(np.radians(camera.vfov) / 2)
    focal = 0.5 * (size / 2) * (camera.xi + np.sqrt(1 - half**2)) / half
    depth = pz + camera.xi
    front = depth > 1e-9
    u, v = (focal * axis / np.where(front, depth, 1) for axis in (px, -py))
    inside = [(-size / 2 <= w) & (w <= size / 2 - 1) for w in (u, v)]
    return np.asarray(front & inside[0] & inside[1])


# Pictures


@pytest.mark.parametrize("max_bytes", [200, 3_000, 100_000])
def test_a_picture_keeps_within_its_bytes(max_bytes: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 384, 3), np.uint8)
    uri = data_uri(noise, max_bytes)
    assert uri.startswith("data:image/webp;base64,")
    assert max_bytes / 8 < len(uri) <= max_bytes


def test_room_for_no_picture_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes is 10; expected room"):
        data_uri(np.zeros((64, 64, 3), np.uint8), 10)


def test_crops_are_taken_where_the_images_differ_most() -> None:
    a = np.zeros((100, 200, 3), np.uint8)
    b = a.copy()
    b[60:80, 150:170] = 255
    rows, columns = most_different(a, b, 20)
    assert (rows, columns) == (slice(60, 80), slice(150, 170))
    assert most_different(a[:8], b[:8], 20)[0] == slice(0, 8)


def test_bicubic_keeps_a_flat_image() -> None:
    assert np.unique(bicubic(np.full((64, 128, 3), 77, np.uint8), 256, 128)).tolist() == [77]


# The page


def test_nothing_is_asked_of_the_network(text: str) -> None:
    for name in ("src", "href", "srcset", "action", "poster", "data"):
        for value in re.findall(rf'[\s<]{name}="([^"]*)"', text):
            assert value.startswith(("data:", "#")), f"{name}={value[:80]}"
    assert set(re.findall(r"url\(\s*['\"]?(.)", text)) <= {"#", "d"}
    for word in ("@import", "sourceMappingURL", "fetch(", "XMLHttpRequest", "//cdn", "import("):
        assert word not in text


def test_only_our_own_scripts_may_run(text: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    allowed = html.unescape(policy[1])
    assert "default-src 'none'" in allowed
    assert allowed.count("'sha256-") == text.count("<script>") == 3
    assert "'unsafe-inline'" not in allowed.partition("script-src")[2]


def test_the_vendored_slider_is_the_published_file_under_its_licence(text: str) -> None:
    vendor = Path(page.__file__).parent / "vendor" / "img-comparison-slider"
    sums = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", (vendor / "README.md").read_text(), re.M))
    assert len(sums) == 2
    for digest, name in sums.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest
    assert (vendor / "LICENSE").read_text() in text


def test_the_page_says_what_came_of_each_interval(text: str) -> None:
    words = html.unescape(text)
    assert "5 of 8 yaw intervals kept, 110 images. Done in 41.3 s." in words
    assert "Panorama 1 scored 0.50, below the threshold of 0.70." in words
    assert "Neither pair has a score" in words  # interval 4
    assert "Panorama 2 has no score" in words  # interval 6, kept by panorama 1 alone
    assert words.count('class="player"') == 10
    assert words.count("<img-comparison-slider") == 17
    assert words.count('class="crop"') == 2 * 17  # left and right view of each, the best pair twice
    assert words.count("A bright room.") == 5


def test_the_contact_sheet_begins_with_the_worst(text: str) -> None:
    sheet = text.partition('<ol class="sheet">')[2].partition("</ol>")[0]
    scores = re.findall(r'class="line"><b>([^<]*)</b>', sheet)
    assert scores[:5] == ["no score", "no score", "no score", "0.50", "0.60"]
    assert len(scores) == 16
    assert scores[3:] == sorted(scores[3:])


def test_the_header_says_what_made_the_group(tmp_path: Path) -> None:
    checksum = "sha256:" + "0123456789abcdef" * 4
    made = {"server": "triton 2.51.0", "weights": {"osediff": checksum, "qwen": "Qwen2_5_VL"}}
    folder = write_example(tmp_path, SCORES, [1], command="panotriton process a b -o c", **made)
    text = html.unescape(write_report(folder).read_text(encoding="utf-8"))
    header = text.partition("<header")[2].partition("</header>")[0]
    for fact in ("0.1.0", "triton 2.51.0", ">sha256:01234567<", "Qwen2_5_VL", ">0.7<", "a b -o c"):
        assert fact in header
    assert f"<dd>{checksum}</dd>" in text.partition('<section id="run">')[2]


def test_what_was_not_recorded_is_said(text: str) -> None:
    run = text.partition('<section id="run">')[2]
    assert "<dt>server</dt><dd>not recorded</dd>" in run
    assert "<dt>weights</dt><dd>not recorded</dd>" in run


def test_an_empty_group_is_well_presented(tmp_path: Path) -> None:
    text = write_report(write_example(tmp_path, [0.4] * 16, [])).read_text(encoding="utf-8")
    assert "<h2>No interval reached the threshold</h2>" in text
    assert 'class="player"' not in text
    assert text.count('class="interval dropped"') == 8


def test_a_missing_panorama_leaves_a_grid(tmp_path: Path) -> None:
    gone = (tmp_path / "gone.jpg", tmp_path / "lost.jpg")
    text = write_report(write_example(tmp_path, SCORES, [1], panoramas=gone)).read_text()
    assert "<image" not in text
    assert "panorama not found" in text


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    name = "it's \"><b onclick=x>&amp;.jpg"
    folder = write_example(
        tmp_path,
        SCORES,
        [1],
        panoramas=(tmp_path / name, tmp_path / "</style>.jpg"),
        description=evil,
        version=evil,
        server=evil,
        weights={evil: evil},
        command=evil,
        options={evil: evil, "threshold": 0.7},
    )
    text = write_report(folder).read_text(encoding="utf-8")
    assert text.count("<script>") == 3
    assert "<img src=x" not in text
    assert "<b onclick" not in text
    assert text.count("</style>") == 3  # the slider's, ours, and the one for no scripts
    assert html.unescape(text).count(evil) >= 5


def test_a_report_keeps_below_its_limit(folder: Path, text: str) -> None:
    shares = [value for name, value in vars(page).items() if re.fullmatch(r"_[A-Z]+_BYTES", name)]
    assert sum(shares) <= page.MAX_BYTES - 1_000_000  # text, footprints and replies
    assert len(text.encode()) <= page.MAX_BYTES


def test_without_intermediates_there_is_no_before(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "group_0001")
    shutil.rmtree(copy / "pairs")
    text = write_report(copy).read_text()
    assert "<img-comparison-slider" not in text
    assert "did not keep the crops" in text


def test_the_command_makes_the_group_again(folder: Path) -> None:
    command_line = read_record(folder).command
    assert command_line.startswith("panotriton process ")
    assert command_line.endswith(" --seed 1 --threshold 0.7 --interpolations 9 -o out")


def test_a_folder_that_is_no_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"group_info.json does not exist; expected a group's"):
        write_report(tmp_path)
    (tmp_path / "group_info.json").write_text("{")
    with pytest.raises(InvalidInput, match="cannot be read"):
        write_report(tmp_path)
    (tmp_path / "group_info.json").write_text(json.dumps({"group_id": 1}))
    with pytest.raises(InvalidInput, match="not as a run writes it.*panoramas"):
        write_report(tmp_path)


def test_a_folder_to_write_to_must_exist(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nowhere is not a folder; expected one for page.html"):
        write_report(folder, tmp_path / "nowhere" / "page.html")


def test_a_missing_image_is_named(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "group_0001")
    gone = copy / "osediff" / "interior_yaw04_pair.jpg"
    gone.unlink()
    with pytest.raises(InvalidImage, match=f"{gone} cannot be read"):
        write_report(copy)


# The index and the command


def test_the_index_links_to_the_reports_that_exist(tmp_path: Path) -> None:
    first = write_example(tmp_path, SCORES, KEPT)
    write_example(tmp_path, [0.4] * 16, [], group_id=2)
    write_report(first)
    text = write_index(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r'<a href="([^#][^"]*)"', text) == ["group_0001/report.html"]
    assert "2 groups, 5 of 16 yaw intervals kept, 110 images." in text
    assert "panotriton report group_0002" in text
    with pytest.raises(InvalidInput, match="has no group; expected folders"):
        write_index(first)


def test_the_index_shows_pairs_that_failed(tmp_path: Path) -> None:
    write_example(tmp_path, SCORES, KEPT)
    failure = {"panoramas": ["in/a.jpg", "in/b.jpg"], "error": "ENCODED_2 <b> is broken"}
    (tmp_path / "failed.json").write_text(json.dumps({"2": failure}))
    text = write_index(tmp_path).read_text(encoding="utf-8")
    assert "1 pair of panoramas failed." in text
    card = text.partition('<li class="failed">\n      <h2>')[2].partition("</li>\n  </ol>")[0]
    assert "<small>0002</small> a × b" in card
    assert "ENCODED_2 &lt;b&gt; is broken" in card


def test_the_command_writes_a_page_or_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_example(tmp_path, SCORES, [1])
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    page_path = tmp_path / "page.html"
    for words in ([str(folder), "-o", str(page_path)], [str(tmp_path)]):
        options = parser.parse_args(["report", *words])
        assert options.run(options) == 0
    printed = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    expected = [page_path, folder / "report.html", tmp_path / "index.html"]
    assert printed == [str(path) for path in expected]
    assert all(path.is_file() for path in expected)
