"""The live page's messages, without a server."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from panotriton import events
from panotriton.errors import InvalidImage, InvalidInput
from panotriton.groups.report.footprint import footprint
from panotriton.groups.report.picture import bicubic
from panotriton.pipeline.camera import Camera, sample_cameras
from panotriton.pipeline.group import interpolate_cameras, interpolate_views, make_pairs
from panotriton.pipeline.images import decode_image
from panotriton.pipeline.quality import Quality
from panotriton.web import live
from panotriton.web.live import Settings
from panotriton.web.live.messages import Messages
from panotriton.web.live.uploads import sphere

PANORAMAS = Path(__file__).parent.parent / "data" / "panoramas"
FILES = [(PANORAMAS / f"{name}.jpg").read_bytes() for name in ("courtyard", "interior")]
SIZE = 64
NAN = float("nan")


@pytest.fixture
def messages() -> Messages:
    return Messages((sphere(1, FILES[0], SIZE), sphere(2, FILES[1], SIZE)))


def test_public_names_are_pinned() -> None:
    assert live.__all__ == ["Settings", "create_app", "serve"]


@pytest.mark.parametrize("name", ["max_upload_bytes", "max_visitors"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"{name} is 0; expected 1 or more"):
        Settings(**{name: 0})


def test_a_sphere_is_all_that_the_pipeline_sees_of_a_panorama() -> None:
    whole = [decode_image("a", data) for data in FILES]
    small = [sphere(number, data, SIZE) for number, data in enumerate(FILES, start=1)]
    cameras = sample_cameras(3)
    (pairs, spheres), (small_pairs, small_spheres) = (
        make_pairs(panoramas, cameras, SIZE) for panoramas in (whole, small)
    )
    np.testing.assert_array_equal(small_pairs, pairs)
    between = interpolate_cameras(cameras, np.array([2, 5], np.int32), 3)
    views, small_views = (interpolate_views(found, between) for found in (spheres, small_spheres))
    np.testing.assert_array_equal(small_views, views)


def test_a_broken_panorama_is_named_by_its_place() -> None:
    with pytest.raises(InvalidImage, match="panorama 2 is a broken image"):
        sphere(2, FILES[0][:5000], SIZE)


def pixels(uri: str) -> np.ndarray:
    return decode_image("uri", base64.b64decode(uri.partition(",")[2]), 1)


def test_before_is_the_pair_enlarged_by_bicubic(messages: Messages) -> None:
    cameras = sample_cameras(3)
    pairs, _ = make_pairs([decode_image("a", data) for data in FILES], cameras, SIZE)
    messages.message(events.Cameras(0, 16, cameras))
    sharp = np.full((2 * SIZE, 4 * SIZE, 3), 90, np.uint8)
    sharp[:, 2 * SIZE :] = 200
    for panorama, interval in ((1, 1), (2, 5)):
        found = messages.message(events.PairReady(1, 16, panorama, interval, sharp))
        expected = bicubic(pairs[8 * (panorama - 1) + interval - 1], 4 * SIZE, 2 * SIZE)
        difference = np.abs(pixels(found["before"]).astype(int) - expected)
        assert difference.mean() < 6  # WebP's own loss; any other pair differs by 29 or more
        assert (found["event"], found["width"], found["height"]) == ("pair", 256, 128)
        assert [round(pixels(end).mean()) for end in found["ends"]] == pytest.approx(
            [90, 200], abs=2
        )


def test_cameras_are_drawn_as_the_report_draws_them(messages: Messages) -> None:
    cameras = sample_cameras(3)
    found = messages.message(events.Cameras(0, 16, cameras))["cameras"]
    assert [(c["panorama"], c["interval"]) for c in found] == [
        (panorama, interval) for panorama in (1, 2) for interval in range(1, 9)
    ]
    left = Camera.from_array(cameras[1, 4, 0])
    assert found[12]["left"]["outline"] == footprint(left).outline
    assert found[12]["left"]["yaw"] == f"{left.yaw:.1f}°".replace("-", "−")


def test_every_event_becomes_json(messages: Messages) -> None:
    view = np.zeros((2 * SIZE, 2 * SIZE, 3), np.uint8)
    camera = Camera(0, 0, 0, 90, 0.5)
    score = Quality(0.5, NAN, 0.5, 0.5, 0.5, NAN)
    told = [
        events.Accepted(0, 16),
        events.Cameras(0, 16, sample_cameras(1)),
        events.PairReady(1, 16, 1, 1, np.zeros((2 * SIZE, 4 * SIZE, 3), np.uint8)),
        events.Scored(1, 16, 1, 1, score, "Final Score: ?"),
        events.Kept(1, 16, 1),
        events.Dropped(1, 15, 2, "neither pair has a score"),
        events.View(2, 15, 2, 1, 3, camera, view),
        events.Described(2, 15, 1, "A room.", ""),
        events.Done(15, 15, (1,)),
    ]
    found = [json.loads(json.dumps(messages.message(event), allow_nan=False)) for event in told]
    kinds = [
        "accepted",
        "cameras",
        "pair",
        "scored",
        "kept",
        "dropped",
        "view",
        "described",
        "done",
    ]
    assert [message["event"] for message in found] == kinds
    assert [(m["done"], m["total"]) for m in found] == [(e.done, e.total) for e in told]
    assert found[3]["score"] is None
    assert found[3]["parts"]["balance"] is None
    assert set(found[3]["parts"]) == set(asdict(score)) - {"final_score"}
    assert (found[6]["index"], found[6]["camera"]["vfov"]) == (3, "90.0°")
    assert found[8]["kept"] == [1]
