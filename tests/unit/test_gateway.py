"""The gateway's endpoints over a client that computes the models here: contract, errors, fuzz."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors.numpy
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from starlette.testclient import TestClient

from panotriton.errors import (
    ConnectError,
    InferenceFailed,
    InvalidInput,
    ModelUnavailable,
    PanotritonError,
)
from panotriton.pipeline.camera import Camera, Sphere, sample_cameras
from panotriton.pipeline.group import interpolate_cameras, interpolate_views, make_pairs
from panotriton.pipeline.images import SUFFIXES, decode_image
from panotriton.web.gateway import Settings, create_apps
from tests.pictures import exif

RNG = np.random.default_rng(0)
CROP = 64
SEED = 7
Tensors = dict[str, np.ndarray]


class Stub:
    """A client whose models are the package's own arithmetic; the networks are replaced by repetition."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Tensors]] = []
        self.failure: Exception | None = None
        self.away = 0  # so many calls fail; 0: all
        self.scores = 0.8
        self.warning = ""  # of the network to sharpen
        self.gate, self.thawed = threading.Event(), threading.Event()
        self.gate.set()
        self.thawed.set()

    def ready(self) -> bool:
        self.thawed.wait(30)
        return self.failure is None

    def close(self) -> None:
        pass

    def infer(self, model: str, inputs: Tensors, outputs: tuple[str, ...]) -> Tensors:
        self.gate.wait(30)
        self.calls.append((model, inputs))
        if self.failure:
            failure = self.failure
            self.failure = None if self.away == 1 else failure
            self.away -= 1
            raise failure
        return {
            name: value for name, value in MODELS[model](self, inputs).items() if name in outputs
        }


def run_preprocess(stub: Stub, inputs: Tensors) -> Tensors:
    panoramas = [inputs["PANORAMA_1"], inputs["PANORAMA_2"]]
    pairs, _ = make_pairs(panoramas, inputs["GIVEN_CAMERAS"], inputs["CROP_SIZE"].item())
    return {"PAIRS": pairs}


def run_interpolate(stub: Stub, inputs: Tensors) -> Tensors:
    count = inputs["NUM_INTERPOLATIONS"].item()
    cameras = interpolate_cameras(inputs["CAMERAS"], inputs["KEPT"], count)
    views = interpolate_views(inputs["SPHERES"], cameras)
    return {"INTERPOLATED": views, "INTERPOLATED_CAMERAS": cameras}


def run_osediff(stub: Stub, inputs: Tensors) -> Tensors:
    images = inputs["IMAGES"]
    if images.shape[1] == 65:
        raise InvalidInput("IMAGES is not to its liking")
    upscale = inputs["UPSCALE"].item()
    told = {"WARNING": np.array([stub.warning.encode()], np.object_)} if stub.warning else {}
    return {"IMAGES_SR": images.repeat(upscale, axis=1).repeat(upscale, axis=2)} | told


def run_scorer(stub: Stub, inputs: Tensors) -> Tensors:
    count = len(inputs["IMAGES"])
    return {
        "SCORE": np.full(count, stub.scores, np.float32),
        "SUB_SCORES": np.full((count, 5), 0.5, np.float32),
        "RAW_OUTPUT": np.array([b"Final Score: 0.8"] * count, np.object_),
    }


def run_describer(stub: Stub, inputs: Tensors) -> Tensors:
    count = len(inputs["IMAGES"])
    texts = [f"图 {index}".encode() for index in range(count)]
    errors = [b""] * (count - 1) + [b"the last fails"]
    return {"DESCRIPTION": np.array(texts, object), "DESCRIPTION_ERROR": np.array(errors, object)}


MODELS: dict[str, Callable[[Stub, Tensors], Tensors]] = {
    "preprocess": run_preprocess,
    "interpolate": run_interpolate,
    "osediff": run_osediff,
    "qwen_scorer": run_scorer,
    "qwen_describer": run_describer,
}


class Spy:
    """What the gateway's threads open or pass through, by where the descriptor really is."""

    def __init__(self) -> None:
        self.opened: set[Path] = set()
        self.passed: set[Path] = set()  # cannot be listed or read
        self._open = os.open

    def __call__(self, *arguments: Any, **options: Any) -> int:
        file = self._open(*arguments, **options)
        if threading.current_thread().name.startswith("gateway"):
            kind = self.passed if arguments[1] & os.O_PATH else self.opened
            kind.add(Path(f"/proc/self/fd/{file}").readlink())
        return file


class Gateway:
    """The three apps over one stub, and the folders that they may open."""

    def __init__(self, folder: Path, output: str = "out", **options: Any) -> None:
        self.stub = Stub()
        self.out, self.data, self.outside = (folder / n for n in (output, "data", "outside"))
        self.data.mkdir()
        self.outside.mkdir()
        options = {"seed": SEED, "wait_s": 0.0} | options
        settings = Settings(output=self.out, roots=(self.data,), crop_size=CROP, **options)
        self.spy = Spy()
        self._apps = create_apps(settings, connect=lambda: self.stub)

    def __enter__(self) -> Gateway:
        self.apps = self._apps.__enter__()
        self.clients = {
            name: TestClient(app, raise_server_exceptions=False) for name, app in self.apps.items()
        }
        return self

    def __exit__(self, *failure: object) -> None:
        self._apps.__exit__(None, None, None)

    def image(self, name: str, height: int = 64, width: int = 128) -> Path:
        """A new image file of smooth noise, which JPEG keeps."""
        path = self.data / name
        path.parent.mkdir(exist_ok=True)
        coarse = RNG.integers(0, 256, (4, 8, 3), np.uint8)
        cv2.imwrite(str(path), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
        return path

    def post(self, endpoint: str, body: Any, status: int = 200) -> Any:
        reply = self.client(endpoint).post(endpoint, json=body)
        assert reply.status_code == status, reply.text
        return reply.json()

    def client(self, endpoint: str) -> TestClient:
        return self.clients[SERVICE[endpoint]]

    def preprocess(self, path: Path, group_id: int, is_first: bool) -> Any:
        body = {"image_path": str(path), "group_id": group_id, "is_first": is_first}
        return self.post("/preprocess_for_group", body)["results"]


SERVICE = {
    "/preprocess_for_group": "preprocess",
    "/generate_interpolated_images": "preprocess",
    "/preprocess_tensor": "preprocess",
    "/interpolate_tensor": "preprocess",
    "/super_resolution_batch": "osediff",
    "/super_resolution_tensor": "osediff",
    "/evaluate_pairs": "quality",
    "/generate_descriptions": "quality",
    "/evaluate_pairs_tensor": "quality",
    "/generate_descriptions_tensor": "quality",
}


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with Gateway(tmp_path) as running:
        yield running


def read(path: str | Path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def camera(**fields: float) -> dict[str, float]:
    return {"yaw": 10.0, "pitch": 5.0, "roll": 0.0, "vfov": 90.0, "xi": 0.4} | fields


@pytest.mark.parametrize("service", ["preprocess", "osediff", "quality"])
def test_health_is_the_servers(gateway: Gateway, service: str) -> None:
    reply = gateway.clients[service].get("/health")
    assert reply.json() == {"status": "healthy", "service": service}
    gateway.stub.failure = ConnectError("gone")
    reply = gateway.clients[service].get("/health")
    assert reply.status_code == 503
    assert "panotriton serve" in reply.json()["error"]


def test_the_first_panorama_fills_pairs_and_params(gateway: Gateway) -> None:
    path = gateway.image("a.png")
    results = gateway.preprocess(path, 3, True)
    folder = gateway.out / "group_0003"
    drawn = sample_cameras(SEED + 3)[0]
    assert [entry["interval"] for entry in results] == list(range(1, 9))
    assert results[0]["yaw_interval"] == [-180, -135]
    for k, entry in enumerate(results):
        assert entry["pair_image"] == str(folder / "pairs" / f"a_yaw{k + 1:02d}_pair.jpg")
        assert list(entry["main_params"].values()) == drawn[k, 0].tolist()
        assert list(entry["rand_params"].values()) == drawn[k, 1].tolist()
        assert json.loads(Path(entry["main_params_file"]).read_text()) == entry["main_params"]
        assert entry["rand_params_file"] == str(
            folder / f"params/a_yaw{k + 1:02d}_right_params.json"
        )
        assert entry["group_id"] == 3
        assert read(entry["pair_image"]).shape == (CROP, 2 * CROP, 3)
    shared = json.loads((folder / "params" / "shared_right_params.json").read_text())
    assert shared == [entry["rand_params"] for entry in results]
    left = json.loads((folder / "params" / "panorama1_left_params.json").read_text())
    assert left == [entry["main_params"] for entry in results]


def test_both_panoramas_have_the_cameras_of_a_seed(gateway: Gateway) -> None:
    gateway.preprocess(gateway.image("a.png"), 1, True)
    second = gateway.preprocess(gateway.image("b.png"), 1, False)
    drawn = sample_cameras(SEED + 1)[1]
    for k, entry in enumerate(second):
        assert list(entry["main_params"].values()) == drawn[k, 0].tolist()
        assert list(entry["rand_params"].values()) == drawn[k, 1].tolist()


def test_the_kept_state_decides_whoever_wrote_it(gateway: Gateway) -> None:
    folder = gateway.out / "group_0001" / "params"
    folder.mkdir(parents=True)
    right, left = camera(yaw=-170.0, pitch=80.0), camera(yaw=-170.0, pitch=-85.0, xi=0.95)
    (folder / "shared_right_params.json").write_text(json.dumps([right] * 8))
    (folder / "panorama1_left_params.json").write_text(json.dumps([left] * 8))
    for entry in gateway.preprocess(gateway.image("b.png"), 1, False):
        assert entry["rand_params"] == right
        got = entry["main_params"]
        assert got["yaw"] == -170.0
        assert -90 <= got["pitch"] <= -65
        assert 0.75 <= got["xi"] <= 1
        assert abs(got["vfov"] - left["vfov"]) <= 20


def test_the_second_panorama_needs_the_first(gateway: Gateway) -> None:
    body = {"image_path": str(gateway.image("b.png")), "group_id": 9, "is_first": False}
    error = gateway.post("/preprocess_for_group", body, 400)["error"]
    assert "group 9 has no cameras yet" in error
    assert "is_first true" in error


@pytest.mark.parametrize("content", ["[]", "{}", "[1, 2, 3, 4, 5, 6, 7, 8]", "no json", "null"])
def test_broken_state_is_named(gateway: Gateway, content: str) -> None:
    gateway.preprocess(gateway.image("a.png"), 1, True)
    (gateway.out / "group_0001/params/shared_right_params.json").write_text(content)
    body = {"image_path": str(gateway.image("b.png")), "group_id": 1, "is_first": False}
    assert "first panorama" in gateway.post("/preprocess_for_group", body, 400)["error"]


def test_panoramas_of_one_name_do_not_overwrite_each_other(gateway: Gateway) -> None:
    gateway.preprocess(gateway.image("a.png"), 1, True)
    body = {"image_path": str(gateway.image("sub/a.png")), "group_id": 1, "is_first": False}
    assert "called a like the first" in gateway.post("/preprocess_for_group", body, 400)["error"]
    body["image_path"] = str(gateway.image("b.png"))
    for _ in range(2):  # the second may be repeated
        gateway.post("/preprocess_for_group", body)


def test_groups_that_interleave_keep_their_cameras(gateway: Gateway) -> None:
    paths = [gateway.image("a.png"), gateway.image("b.png")]

    def group(group_id: int) -> list[Any]:
        return [
            gateway.preprocess(paths[0], group_id, True),
            gateway.preprocess(paths[1], group_id, False),
        ]

    ids = [1, 2, 65, 66]  # 1 and 65 share a lock
    with ThreadPoolExecutor(4) as pool:
        groups = dict(zip(ids, pool.map(group, ids), strict=True))
    for group_id, panoramas in groups.items():
        drawn = sample_cameras(SEED + group_id)
        for p, entries in enumerate(panoramas):
            for k, entry in enumerate(entries):
                assert list(entry["main_params"].values()) == drawn[p, k, 0].tolist()
                assert list(entry["rand_params"].values()) == drawn[p, k, 1].tolist()
    assert not list(gateway.out.rglob(".*"))


def test_a_batch_is_one_request_a_size_and_a_bad_image_fails_alone(gateway: Gateway) -> None:
    good = [gateway.image(f"{i}.png") for i in range(3)]
    other = gateway.image("other.webp", 80, 80)
    refused = gateway.image("refused.jpg", 65, 70)
    broken = gateway.data / "broken.jpg"
    broken.write_bytes(good[0].read_bytes()[:200])
    twin = gateway.image("sub/0.png")
    unknown = gateway.data / "0.gif"
    unknown.write_bytes(good[0].read_bytes())
    none = gateway.data / "none.png"
    paths = [good[0], broken, other, good[1], refused, twin, unknown, none, good[2]]
    body = {"input_paths": [str(p) for p in paths], "output_dir": str(gateway.data / "g")}
    reply = gateway.post("/super_resolution_batch", body)
    assert reply["success"] is True
    says = [
        None,
        "broken.jpg is a broken image",
        None,
        None,
        "not to its liking",
        "0.png is the name of another image",
        "ends in no known format; expected .jpg, .jpeg, .png, .webp",
        "No such file",
        None,
    ]
    for path, entry, words in zip(paths, reply["results"], says, strict=True):
        if words:
            assert entry["success"] is False
            assert entry["output_path"] is None
            assert words in entry["error"]
        else:
            assert entry == {
                "success": True,
                "output_path": str(gateway.data / "g" / "osediff" / path.name),
            }
    assert [inputs["IMAGES"].shape for _, inputs in gateway.stub.calls] == [
        (3, 64, 128, 3),
        (1, 80, 80, 3),
        (1, 65, 70, 3),
    ]
    expected = read(good[1]).repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(read(reply["results"][3]["output_path"]), expected)


def test_files_of_every_format_are_read_and_written(gateway: Gateway) -> None:
    source = read(gateway.image("a.png"))
    paths = []
    for suffix in SUFFIXES:
        paths.append(gateway.data / f"in{suffix}")
        PILImage.fromarray(source).save(paths[-1], exif=b"" if suffix == ".bmp" else exif(6))
    results = gateway.post("/super_resolution_batch", {"input_paths": list(map(str, paths))})
    for path, entry in zip(paths, results["results"], strict=True):
        assert entry["output_path"] == str(gateway.out / "osediff" / path.name)
        upright = source if path.suffix == ".bmp" else np.rot90(source, -1)
        sharp = decode_image("X", Path(entry["output_path"]).read_bytes())
        expected = upright.repeat(2, axis=0).repeat(2, axis=1).astype(int)
        lossy = path.suffix in (".jpg", ".jpeg", ".webp", ".avif")
        assert np.abs(sharp - expected).mean() < (4 if lossy else 1e-9)


def test_a_picture_too_thin_for_the_scorer_fails_alone(gateway: Gateway) -> None:
    good, thin = gateway.image("a.png"), gateway.image("thin.png", 64, 12_801)
    pairs = [{"pair_image": str(path)} for path in (thin, good)]
    bad, scored = gateway.post("/evaluate_pairs", {"pairs_data": pairs})["results"]
    assert "thin.png is 12801×64 px; expected one side at most 200 times" in bad["error"]
    assert scored["final_score"] == "0.8"
    described = gateway.post("/generate_descriptions", {"image_paths": [str(thin), str(good)]})
    assert "thin.png is 12801×64 px" in described["results"][0]["error"]
    assert described["results"][1]["description"]
    for endpoint in ("/evaluate_pairs_tensor", "/generate_descriptions_tensor"):
        sent = encode(np.zeros((28, 5880, 3), np.uint8), "npy", layout="HWC")
        reply = gateway.client(endpoint).post(endpoint, **sent)
        assert reply.status_code == 400
        assert "tensor is 5880×28 px" in reply.json()["error"]


def test_without_output_dir_results_go_to_the_gateways_folder(gateway: Gateway) -> None:
    reply = gateway.post("/super_resolution_batch", {"input_paths": [str(gateway.image("a.png"))]})
    assert reply["results"][0]["output_path"] == str(gateway.out / "osediff" / "a.png")


def test_scores_are_text_and_failures_are_left_out_by_an_old_filter(gateway: Gateway) -> None:
    pair = str(gateway.image("a.png"))
    echo = {"interval": 4, "main_params": camera(), "rand_params": None, "yaw_interval": [-45, 0]}
    bad = str(gateway.data / "none.png")
    pairs = [
        {"pair_image": pair, **echo},
        {"pair_image": bad, **echo},
        {"super_resolved": pair},
        {},
    ]
    good, missing, second, nameless = gateway.post("/evaluate_pairs", {"pairs_data": pairs})[
        "results"
    ]
    assert good == {"pair_image": pair, "final_score": "0.8", **echo}
    assert missing["success"] is False
    assert missing["image_path"] == bad
    assert "interval" not in missing
    assert second["pair_image"] == pair
    assert "pair_image is missing" in nameless["error"]
    gateway.stub.scores = math.nan
    reply = gateway.post("/evaluate_pairs", {"pairs_data": [{"pair_image": pair}]})
    assert reply["results"][0]["final_score"] is None


def test_images_are_asked_for_in_the_clients_portions(gateway: Gateway) -> None:
    pairs = [{"pair_image": str(gateway.image("a.png"))}] * 65
    results = gateway.post("/evaluate_pairs", {"pairs_data": pairs})["results"]
    assert [result["final_score"] for result in results] == ["0.8"] * 65
    assert [len(inputs["IMAGES"]) for _, inputs in gateway.stub.calls] == [64, 1]


def test_descriptions(gateway: Gateway) -> None:
    paths = [
        str(gateway.image("a.png")),
        str(gateway.data / "none.png"),
        str(gateway.image("b.png")),
    ]
    first, missing, last = gateway.post("/generate_descriptions", {"image_paths": paths})["results"]
    assert first["image_path"] == paths[0]
    assert first["description"] == "图 0"
    assert "error" not in first
    assert missing["description"] == ""
    assert "No such file" in missing["error"]
    assert last["error"] == "the last fails"


def interpolate(gateway: Gateway, splits: list[Any], count: int = 2, **body: Any) -> list[Any]:
    for name in ("a", "a_yaw_b"):
        if not (gateway.data / f"{name}.png").exists():
            gateway.image(f"{name}.png")
    body = {
        "split_results": splits,
        "panorama1_path": str(gateway.data / "a.png"),
        "panorama2_path": str(gateway.data / "a_yaw_b.png"),
        "group_id": 5,
        "num_interpolations": count,
    } | body
    return list(gateway.post("/generate_interpolated_images", body)["results"])


def split(base: str, interval: int, folder: str = "", **fields: Any) -> dict[str, Any]:
    stem = f"{base}_yaw{interval:02d}_pair"
    return {
        "pair_image": f"/somewhere/{stem}.jpg",
        "left_image": f"{folder}{stem}_left.jpg",
        "main_params": camera(pitch=float(interval)),
        "rand_params": camera(pitch=-9.0),
        "interval": interval,
    } | fields


def test_in_between_views_are_named_after_the_left_image(gateway: Gateway) -> None:
    folder = f"{gateway.data}/group_0042/interpolated/"
    splits = [split("a", 1, folder), split("a_yaw_b", 1, folder), split("x", 3), split("a", 3)]
    one, two, unknown, three = interpolate(gateway, splits)
    assert [r["panorama"] for r in (one, two, unknown, three)] == [
        "panorama1",
        "panorama2",
        None,
        "panorama1",
    ]
    assert unknown["success"] is False
    assert "is of neither panorama" in unknown["error"]
    view = one["interpolated_images"][1]
    assert view["path"] == f"{folder}a_yaw01_pair_left_interp_02.jpg"
    assert view["weight_idx"] == 2
    assert view["params"]["pitch"] == pytest.approx(1 / 3 - 9 * 2 / 3)
    expected = Sphere(read(gateway.data / "a.png"), CROP)
    assert len(one["interpolated_images"]) == 2
    crop = expected.crop(Camera(**view["params"]))
    assert cv2.PSNR(read(view["path"]), crop) > 30
    fallback = f"{gateway.out}/group_0005/interpolated/a_yaw03_pair_left_interp_01.jpg"
    assert three["interpolated_images"][0]["path"] == fallback
    assert len(gateway.stub.calls) == 1


def test_more_entries_than_a_request_holds(gateway: Gateway) -> None:
    splits = [split("a", interval) for interval in range(1, 12)]
    results = interpolate(gateway, splits, 1)
    assert len(gateway.stub.calls) == 2
    for interval, result in enumerate(results, start=1):
        (view,) = result["interpolated_images"]
        assert view["params"]["pitch"] == pytest.approx((interval - 9) / 2)
        assert Path(view["path"]).exists()


def test_panoramas_of_one_name_cannot_be_told_apart(gateway: Gateway) -> None:
    body = {
        "split_results": [split("a", 1)],
        "panorama1_path": str(gateway.image("a.png")),
        "panorama2_path": str(gateway.image("sub/a.png")),
        "group_id": 1,
    }
    assert (
        "both panoramas are called a"
        in gateway.post("/generate_interpolated_images", body, 400)["error"]
    )


FORBIDDEN = [
    ("/preprocess_for_group", {"image_path": "{x}", "group_id": 1}),
    ("/super_resolution_batch", {"input_paths": ["{a}", "{x}"], "output_dir": "{data}"}),
    ("/super_resolution_batch", {"input_paths": ["{a}"], "output_dir": "{outside}"}),
    ("/super_resolution_batch", {"input_paths": ["{a}"], "output_dir": "{data}/link/new"}),
    ("/evaluate_pairs", {"pairs_data": [{"pair_image": "{x}"}]}),
    ("/generate_descriptions", {"image_paths": ["{a}", "{data}/link/x.png"]}),
    (
        "/generate_interpolated_images",
        {
            "split_results": [split("a", 1)],
            "panorama1_path": "{a}",
            "panorama2_path": "{x}",
            "group_id": 1,
        },
    ),
    (
        "/generate_interpolated_images",
        {
            "split_results": [split("a", 1, "{outside}/group_1/interpolated/")],
            "panorama1_path": "{a}",
            "panorama2_path": "{b}",
            "group_id": 1,
        },
    ),
]


@pytest.mark.parametrize(("endpoint", "body"), FORBIDDEN)
def test_paths_outside_the_roots_are_forbidden(
    gateway: Gateway, endpoint: str, body: dict[str, Any]
) -> None:
    secret = gateway.image("x.png").rename(gateway.outside / "x.png")
    (gateway.data / "link").symlink_to(gateway.outside)
    names = {
        "x": secret,
        "a": gateway.image("a.png"),
        "b": gateway.image("b.png"),
        "data": gateway.data,
        "outside": gateway.outside,
    }
    text = json.dumps(body)
    for name, path in names.items():
        text = text.replace(f"{{{name}}}", str(path))
    assert "outside the folders" in gateway.post(endpoint, json.loads(text), 403)["error"]
    assert not gateway.stub.calls
    assert [path.name for path in gateway.outside.iterdir()] == ["x.png"]


BAD = [
    ("/preprocess_for_group", {}, ["image_path is missing"]),
    ("/preprocess_for_group", [], ["the body"]),
    ("/preprocess_for_group", {"image_path": "", "group_id": 1}, ["image_path"]),
    ("/preprocess_for_group", {"image_path": "a", "group_id": -1}, ["group_id is -1", "greater"]),
    ("/preprocess_for_group", {"image_path": "a", "group_id": "x"}, ["group_id is 'x'", "integer"]),
    ("/super_resolution_batch", {"input_paths": []}, ["input_paths", "at least 1"]),
    ("/evaluate_pairs", {"pairs_data": [1]}, ["pairs_data.0 is 1"]),
    ("/generate_descriptions", {"image_paths": None}, ["image_paths is None"]),
    (
        "/generate_interpolated_images",
        {
            "split_results": [split("a", 1, main_params=camera(roll=99.0))],
            "panorama1_path": "a",
            "panorama2_path": "b",
            "group_id": 1,
        },
        ["split_results.0.main_params.roll is 99.0", "90"],
    ),
]


@pytest.mark.parametrize(("endpoint", "body", "says"), BAD)
def test_a_wrong_request_is_400_and_names_the_field(
    gateway: Gateway, endpoint: str, body: Any, says: list[str]
) -> None:
    error = gateway.post(endpoint, body, 400)["error"]
    for words in says:
        assert words in error


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"group_id": "9" * 20_000}, "exceeded maximum size"),
        ({"group_id": [["y" * 99] * 99] * 99}, "valid integer"),
        ({"panorama1_path": [{"y" * 99: "y" * 99}] * 99}, "valid string"),
        ({"split_results": [split("a", 1, main_params=camera() | {"y" * 20_000: "∞"})]}, "inf"),
    ],
)
def test_what_came_is_given_back_in_a_few_characters(
    gateway: Gateway, body: dict[str, Any], says: str
) -> None:
    whole = {
        "split_results": [split("a", 1)],
        "panorama1_path": "a",
        "panorama2_path": "b",
        "group_id": 1,
    }
    content = json.dumps(whole | body, ensure_ascii=False).replace('"∞"', "1e999")
    reply = gateway.clients["preprocess"].post(
        "/generate_interpolated_images",
        content=content.encode(),
        headers={"content-type": "application/json"},
    )
    assert reply.status_code == 400
    assert says in reply.json()["error"]
    assert len(reply.json()["error"]) < 300


def test_every_failure_has_the_one_shape(gateway: Gateway) -> None:
    client = gateway.clients["osediff"]
    assert client.get("/none").json() == {"error": "Not Found"}
    assert client.get("/super_resolution_batch").json() == {"error": "Method Not Allowed"}
    headers = {"content-type": "application/json"}
    reply = client.post("/super_resolution_batch", content=b"{", headers=headers)
    assert reply.status_code == 400
    assert "no JSON" in reply.json()["error"]
    body = {"pairs_data": [{"pair_image": "\ud800", "interval": math.nan}]}
    reply = gateway.clients["quality"].post(
        "/evaluate_pairs", content=json.dumps(body), headers=headers
    )
    assert reply.status_code == 400
    assert set(reply.json()) == {"error"}


@pytest.mark.parametrize(
    ("failure", "status", "says"),
    [
        (ConnectError("no server answers"), 503, "no server answers"),
        (PanotritonError("disk full"), 500, "disk full"),
        (ZeroDivisionError("oops"), 500, "ZeroDivisionError: oops (the gateway's log"),
    ],
)
def test_what_is_not_the_images_fault_fails_the_request(
    gateway: Gateway, failure: Exception, status: int, says: str
) -> None:
    gateway.stub.failure = failure
    body = {"input_paths": [str(gateway.image("a.png"))]}
    assert says in gateway.post("/super_resolution_batch", body, status)["error"]


def test_a_failed_model_fails_its_images(gateway: Gateway) -> None:
    gateway.stub.failure = InferenceFailed("osediff: out of memory")
    body = {"input_paths": [str(gateway.image("a.png"))]}
    (entry,) = gateway.post("/super_resolution_batch", body)["results"]
    assert entry == {"success": False, "output_path": None, "error": "osediff: out of memory"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threads": 0}, "threads is 0; expected 1 to 256"),
        ({"crop_size": 63}, "crop_size is 63; expected 64 to 2048"),
        ({"seed": -1}, "seed is -1"),
        ({"upscale": 5}, "upscale is 5; expected 1 to 4"),
        ({"jpeg_quality": 101}, "jpeg_quality is 101; expected 1 to 100"),
        ({"answer_within_s": 0}, "answer_within_s is 0; expected more than 0"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, options: dict[str, int], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        Settings(output=tmp_path, **options)


def test_an_output_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(InvalidInput, match="file cannot be made: File exists"),
        create_apps(Settings(output=tmp_path / "file")),
    ):
        pass


@pytest.mark.parametrize("place", ["file", "file/deeper"])
def test_an_output_dir_that_is_a_file_is_named_before_any_work(
    gateway: Gateway, place: str
) -> None:
    (gateway.data / "file").write_bytes(b"mine")
    asked = {
        "input_paths": [str(gateway.image("a.png"))],
        "output_dir": str(gateway.data / place),
    }
    error = gateway.post("/super_resolution_batch", asked, 400)["error"]
    assert "file" in error
    assert "Not a directory" in error
    assert not gateway.stub.calls
    assert (gateway.data / "file").read_bytes() == b"mine"


def test_too_many_requests_are_refused_at_once(tmp_path: Path) -> None:
    with Gateway(tmp_path, threads=1, max_waiting=1) as gateway, ThreadPoolExecutor(3) as pool:
        gateway.stub.gate.clear()
        body = {"input_paths": [str(gateway.image("a.png"))]}
        post = gateway.clients["osediff"].post
        asked = [pool.submit(post, "/super_resolution_batch", json=body) for _ in range(3)]
        refused, accepted = wait(asked, return_when=FIRST_COMPLETED, timeout=30)
        gateway.stub.gate.set()
        assert [answer.result().status_code for answer in refused] == [503]
        assert [answer.result().status_code for answer in accepted] == [200, 200]


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("endpoint", ["/super_resolution_tensor", "/super_resolution_batch"])
def test_a_large_body_is_413_in_the_one_shape(
    tmp_path: Path, endpoint: str, declared: bool
) -> None:
    with Gateway(tmp_path, max_body_bytes=1000) as gateway:
        size = 1001 if endpoint.endswith("_tensor") else (4 << 20) + 1
        content: Any = b" " * size if declared else iter([b" " * (size - 1), b" "])
        headers = {"content-type": "application/json"}
        reply = gateway.client(endpoint).post(endpoint, content=content, headers=headers)
        assert reply.status_code == 413
        assert "--max-body-mb" in reply.json()["error"]


# Tensors


def encode(array: np.ndarray, wire: str, **options: Any) -> dict[str, Any]:
    """Arguments of a POST with the tensor as that encoding has it."""
    if wire == "json":
        data = base64.b64encode(array.tobytes()).decode()
        body = {"tensor": data, "shape": array.shape, "dtype": array.dtype.name} | options
        return {"json": body}
    query = {
        name: json.dumps(value) if isinstance(value, list) else value
        for name, value in options.items()
    }
    headers = {"content-type": "application/octet-stream"}
    if wire == "npy":
        file = io.BytesIO()
        np.save(file, array)
        return {"content": file.getvalue(), "params": query, "headers": headers}
    return {
        "content": safetensors.numpy.save({"tensor": array}),
        "params": query,
        "headers": headers,
    }


def decode(reply: Any, wire: str) -> tuple[np.ndarray, str, Any]:
    """The reply's tensor, its layout and the cameras."""
    assert reply.status_code == 200, reply.text
    if wire == "json":
        body = reply.json()
        array = np.frombuffer(base64.b64decode(body["tensor"]), body["dtype"]).reshape(
            body["shape"]
        )
        return array, body["layout"], body.get("cameras")
    layout = reply.headers["x-tensor-layout"]
    if wire == "npy":
        return np.load(io.BytesIO(reply.content)), layout, None
    tensors = safetensors.numpy.load(reply.content)
    return tensors["tensor"], layout, tensors.get("cameras")


def arranged(image: np.ndarray, layout: str, dtype: str) -> np.ndarray:
    """Images (N, H, W, 3) as that layout and dtype."""
    array = image.transpose(0, 3, 1, 2) if "CHW" in layout else image
    array = array if "N" in layout else array[0]
    array = array if dtype == "uint8" else array.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(array)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("layout", ["HWC", "NHWC", "CHW", "NCHW"])
@pytest.mark.parametrize("wire", ["json", "npy", "safetensors"])
def test_a_tensor_comes_back_as_it_went(
    gateway: Gateway, wire: str, layout: str, dtype: str
) -> None:
    images = RNG.integers(0, 256, (2 if "N" in layout else 1, 16, 24, 3), np.uint8)
    sent = encode(arranged(images, layout, dtype), wire, layout=layout, upscale=3)
    reply = gateway.clients["osediff"].post("/super_resolution_tensor", **sent)
    got, got_layout, _ = decode(reply, wire)
    expected = arranged(images.repeat(3, axis=1).repeat(3, axis=2), layout, dtype)
    assert got_layout == layout
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("wire", ["json", "npy", "safetensors"])
def test_a_prompt_that_is_cut_is_told_in_reply_and_log(
    gateway: Gateway, wire: str, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.stub.warning = "PROMPT is read up to character 9 and not from '雨…' on"
    sent = encode(np.zeros((8, 8, 3), np.uint8), wire, layout="HWC", prompt="x")
    reply = gateway.clients["osediff"].post("/super_resolution_tensor", **sent)
    assert decode(reply, wire)[0].shape == (16, 16, 3)
    if wire == "json":
        assert reply.json()["warning"] == gateway.stub.warning
    else:
        told = reply.headers["x-tensor-warning"].encode().decode("unicode_escape")
        assert told == gateway.stub.warning
    assert caplog.messages == [f"super_resolution_tensor: {gateway.stub.warning}"]
    gateway.stub.warning = ""
    reply = gateway.clients["osediff"].post("/super_resolution_tensor", **sent)
    assert "x-tensor-warning" not in reply.headers
    assert wire != "json" or "warning" not in reply.json()


@pytest.mark.parametrize("wire", ["json", "npy", "safetensors"])
def test_pairs_and_views_by_tensors_are_the_pipelines(gateway: Gateway, wire: str) -> None:
    panoramas = RNG.integers(0, 256, (2, 70, 140, 3), np.uint8)
    post = gateway.clients["preprocess"].post
    sent = encode(panoramas, wire, layout="NHWC", seed=3)
    pairs, layout, cameras = decode(post("/preprocess_tensor", **sent), wire)
    expected, spheres = make_pairs(list(panoramas), sample_cameras(3), CROP)
    np.testing.assert_array_equal(pairs, expected)
    assert layout == "NHWC"
    if wire != "npy":
        np.testing.assert_array_equal(cameras, sample_cameras(3))
    kept = sample_cameras(3)[:, 1:4]
    sent = encode(panoramas, wire, layout="NHWC", cameras=kept.tolist(), num_interpolations=2)
    views, _, between = decode(post("/interpolate_tensor", **sent), wire)
    lerped = interpolate_cameras(kept, np.arange(1, 4, dtype=np.int32), 2)
    np.testing.assert_array_equal(views, interpolate_views(spheres, lerped))
    if wire != "npy":
        np.testing.assert_array_equal(between, lerped)


def test_one_panorama_at_a_time_gives_the_same_pairs(gateway: Gateway) -> None:
    panoramas = RNG.integers(0, 256, (2, 70, 140, 3), np.uint8)
    expected, _ = make_pairs(list(panoramas), sample_cameras(3), 80)
    for p, panorama in enumerate(panoramas):
        sent = encode(panorama, "json", layout="HWC", seed=3, is_first=p == 0, crop_size=80)
        reply = gateway.clients["preprocess"].post("/preprocess_tensor", **sent)
        pairs, layout, _ = decode(reply, "json")
        np.testing.assert_array_equal(pairs, expected[8 * p : 8 * p + 8])
        assert layout == "NHWC"


def test_cameras_as_a_safetensor(gateway: Gateway) -> None:
    panorama, cameras = RNG.integers(0, 256, (70, 140, 3), np.uint8), sample_cameras(5)[:1]
    reply = gateway.clients["preprocess"].post(
        "/preprocess_tensor?layout=HWC",
        content=safetensors.numpy.save({"tensor": panorama, "cameras": cameras}),
        headers={"content-type": "application/octet-stream"},
    )
    pairs, _, returned = decode(reply, "safetensors")
    np.testing.assert_array_equal(returned, cameras)
    assert pairs.shape == (8, CROP, 2 * CROP, 3)


@pytest.mark.parametrize("wire", ["json", "npy", "safetensors"])
def test_scores_and_descriptions_of_tensors_are_json(gateway: Gateway, wire: str) -> None:
    sent = encode(RNG.integers(0, 256, (2, 32, 64, 3), np.uint8), wire, layout="NHWC")
    reply = gateway.clients["quality"].post("/evaluate_pairs_tensor", **sent).json()
    assert len(reply["results"]) == 2
    assert reply["results"][0]["final_score"] == 0.8
    assert reply["results"][0]["raw_output"] == "Final Score: 0.8"
    reply = gateway.clients["quality"].post("/generate_descriptions_tensor", **sent).json()
    assert [entry["description"] for entry in reply["results"]] == ["图 0", "图 1"]


IMAGE = np.zeros((16, 16, 3), np.uint8)
OCTETS = {"content-type": "application/octet-stream"}


def npy(header: bytes, data: bytes = b"") -> dict[str, Any]:
    body = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data
    return {"content": body, "params": {"layout": "HWC"}, "headers": OCTETS}


def saved(array: np.ndarray) -> dict[str, Any]:
    return encode(array, "npy", layout="HWC")


BAD_TENSORS = [
    (encode(IMAGE, "json"), ["layout is missing"]),
    (encode(IMAGE, "npy"), ["layout is missing"]),
    (encode(IMAGE, "json", layout="WHC"), ["layout is 'WHC'", "'HWC', 'NHWC', 'CHW' or 'NCHW'"]),
    (encode(IMAGE, "json", layout="CHW"), ["(16, 16, 3)", "C × H × W with C = 3"]),
    (encode(IMAGE, "json", layout="NHWC"), ["N × H × W × C"]),
    (encode(IMAGE[..., :1].repeat(4, 2), "json", layout="HWC"), ["(16, 16, 4)", "drop alpha"]),
    (encode(IMAGE[:4], "json", layout="HWC"), ["tensor is 16×4 px", "at least 8"]),
    (encode(IMAGE, "json", layout="HWC", shape=[16, 17, 3]), ["768 bytes; expected 816"]),
    (encode(IMAGE, "json", layout="HWC", shape=[1 << 31, 1 << 31, 3]), ["768 bytes"]),
    (encode(IMAGE, "json", layout="HWC", shape=[-1, 16, 3]), ["shape.0 is -1"]),
    (encode(IMAGE, "json", layout="HWC", dtype="float64"), ["dtype is 'float64'", "'uint8'"]),
    (encode(IMAGE, "json", layout="HWC", tensor="abc"), ["no base64"]),
    (encode(IMAGE + np.float32(2), "json", layout="HWC"), ["from 2 to 2", "float32 from 0 to 1"]),
    (encode(IMAGE * np.float32(np.nan), "json", layout="HWC"), ["from nan to nan"]),
    (encode(IMAGE, "json", layout="HWC", upscale=5), ["upscale is 5", "less than or equal to 4"]),
    (saved(IMAGE.astype(np.int16)), [".npy header", "dtype <i2", "numpy.save"]),
    (saved(np.asfortranarray(IMAGE)), ["Fortran", "ascontiguousarray"]),
    (saved(np.array([{}])), [".npy header"]),
    (
        npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 99999999, 3)}"),
        ["0 bytes"],
    ),
    (
        npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -1, 3)}"),
        ["(-1, -1, 3); expected sides of 1 or more"],
    ),
    (
        {
            "json": {"tensor": "", "dtype": "uint8", "layout": "CHW"}
            | {"shape": [0, 1 << 31, 1 << 31, 1 << 31]}
        },
        ["(0, 2147483648, 2147483648, 2147483648); expected sides of 1 or more"],
    ),
    (npy(b"__import__('os').abort()"), [".npy header"]),
    (npy(b"(" * 900), [".npy header"]),
    (npy(b"-" * 900), [".npy header"]),
    (npy(b" " * 2000), ["2010 bytes"]),
    ({"content": b"\x93NUMPY", "headers": OCTETS}, [".npy header"]),
    ({"content": b"junk", "headers": OCTETS}, ["neither .npy nor safetensors"]),
    (
        {"content": safetensors.numpy.save({"x": IMAGE}), "headers": OCTETS},
        ["hold ['x']", "'tensor'"],
    ),
    (
        {"content": b"x", "headers": {"content-type": "text/plain"}},
        ["text/plain", "application/json"],
    ),
    ({"content": b"{", "headers": {"content-type": "application/json"}}, ["no JSON"]),
]


@pytest.mark.parametrize(("sent", "says"), BAD_TENSORS)
def test_a_wrong_tensor_is_400_and_says_what_was_expected(
    gateway: Gateway, sent: dict[str, Any], says: list[str]
) -> None:
    reply = gateway.clients["osediff"].post("/super_resolution_tensor", **sent)
    assert reply.status_code == 400
    for words in says:
        assert words in reply.json()["error"]


PANORAMA = np.zeros((64, 64, 3), np.uint8)
BAD_CAMERAS = [
    ("/preprocess_tensor", {"seed": -1}, "seed is -1"),
    ("/preprocess_tensor", {"seed": 1, "cameras": sample_cameras(1)[:1].tolist()}, "both given"),
    (
        "/preprocess_tensor",
        {"cameras": sample_cameras(1)[:1, :2].tolist()},
        "expected (1, 8, 2, 5)",
    ),
    ("/preprocess_tensor", {"crop_size": 63}, "crop_size is 63"),
    ("/interpolate_tensor", {}, "cameras are missing"),
    ("/interpolate_tensor", {"cameras": sample_cameras(1).tolist()}, "of 2 panoramas; expected 1"),
    ("/interpolate_tensor", {"cameras": [[[[0, 0, 0, 90]] * 2]]}, "at least 5"),
    (
        "/interpolate_tensor",
        {"cameras": [[[[0, 0, 0, 190, 0]] * 2]]},
        "cameras[0, 0, 0]: camera field vfov",
    ),
    (
        "/interpolate_tensor",
        {"cameras": sample_cameras(1)[:1].tolist(), "num_interpolations": 255, "crop_size": 2048},
        "at most 1 with 255 views of 2048 px",
    ),
]


@pytest.mark.parametrize(("endpoint", "options", "says"), BAD_CAMERAS)
def test_wrong_cameras_are_named(
    gateway: Gateway, endpoint: str, options: dict[str, Any], says: str
) -> None:
    sent = encode(PANORAMA, "json", layout="HWC", **options)
    reply = gateway.clients["preprocess"].post(endpoint, **sent)
    assert reply.status_code == 400
    assert says in reply.json()["error"]


def test_the_api_page_tells_tensors_apart(gateway: Gateway) -> None:
    for service, app in gateway.apps.items():
        paths = app.openapi()["paths"]
        assert set(paths) == {"/health"} | {
            path for path, name in SERVICE.items() if name == service
        }
        for path in (path for path in paths if path.endswith("_tensor")):
            body = paths[path]["post"]["requestBody"]
            fields = body["content"]["application/json"]["schema"]["properties"]
            assert fields["layout"]["enum"] == ["HWC", "NHWC", "CHW", "NCHW"]
            assert fields["dtype"]["enum"] == ["uint8", "float32"]
            assert "RGB" in fields["tensor"]["description"]
            assert "0…255" in fields["tensor"]["description"]
            assert "application/octet-stream" in body["content"]
            names = {parameter["name"] for parameter in paths[path]["post"]["parameters"]}
            assert names == set(fields) - {"tensor", "shape", "dtype"}
        for path in paths:
            (operation,) = paths[path].values()
            assert "422" not in operation["responses"]


# What the file-path services did, and their client counts on


def test_a_deleted_output_and_a_replaced_root_need_no_restart(gateway: Gateway) -> None:
    gateway.preprocess(gateway.image("a.png"), 1, True)
    shutil.rmtree(gateway.out)
    gateway.data.rename(gateway.data.with_name("old"))
    gateway.data.mkdir()
    results = gateway.preprocess(gateway.image("b.png"), 1, True)
    assert Path(results[0]["pair_image"]).is_file()


def test_swapped_panoramas_take_over_the_folder_of_the_last_run(gateway: Gateway) -> None:
    city, forest = gateway.image("city.png"), gateway.image("forest.png")
    for first, second in ((city, forest), (forest, city), (city, forest)):
        gateway.preprocess(first, 1, True)
        for entry, drawn in zip(
            gateway.preprocess(second, 1, False), sample_cameras(SEED + 1)[1], strict=True
        ):
            assert list(entry["main_params"].values()) == drawn[0].tolist()


@pytest.mark.parametrize("content", [None, b"no image"])
def test_a_panorama_that_cannot_be_read_leaves_its_groups_folder(
    gateway: Gateway, content: bytes | None
) -> None:
    path = gateway.data / "broken.jpg"
    if content:
        path.write_bytes(content)
    gateway.post("/preprocess_for_group", {"image_path": str(path), "group_id": 5}, 400)
    assert list(gateway.out.rglob("*")) == [gateway.out / "group_0005"]


def test_a_group_that_failed_without_the_server_is_asked_for_again(gateway: Gateway) -> None:
    first, second = gateway.image("a.png"), gateway.image("b.png")
    asked = {"image_path": str(first), "group_id": 1, "is_first": True}
    gateway.stub.failure = ConnectError("gone")
    gateway.post("/preprocess_for_group", asked, 503)
    gateway.stub.failure = None
    early = {"image_path": str(second), "group_id": 1, "is_first": False}
    assert "no cameras yet" in gateway.post("/preprocess_for_group", early, 400)["error"]
    assert len(gateway.preprocess(first, 1, True)) == 8
    assert len(gateway.preprocess(second, 1, False)) == 8


def test_an_output_called_preprocess_has_its_groups_beside_it(tmp_path: Path) -> None:
    with Gateway(tmp_path, "run/preprocess_output") as gateway:
        (entry, *_) = gateway.preprocess(gateway.image("a.png"), 1, True)
        group = tmp_path / "run" / "group_0001"
        assert entry["pair_image"] == str(group / "pairs" / "a_yaw01_pair.jpg")
        body = {"input_paths": [entry["pair_image"]], "output_dir": str(group)}
        (sharp,) = gateway.post("/super_resolution_batch", body)["results"]
        assert sharp["output_path"] == str(group / "osediff" / "a_yaw01_pair.jpg")
        for outside in (tmp_path / "run", tmp_path / "run" / "group_x", tmp_path / "x"):
            gateway.post("/super_resolution_batch", body | {"output_dir": str(outside)}, 403)


def test_a_linked_output_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with Gateway(tmp_path) as gateway:
        (entry, *_) = gateway.preprocess(gateway.image("a.png"), 1, True)
        group = tmp_path / "out" / "group_0001"
        assert entry["pair_image"] == str(group / "pairs" / "a_yaw01_pair.jpg")
        body = {"input_paths": [entry["pair_image"]], "output_dir": str(group)}
        (sharp,) = gateway.post("/super_resolution_batch", body)["results"]
        assert sharp["output_path"] == str(group / "osediff" / "a_yaw01_pair.jpg")
        (views,) = interpolate(gateway, [split("a", 1, f"{group}/interpolated/")], 1)
        assert Path(views["interpolated_images"][0]["path"]).parent == group / "interpolated"
    assert (tmp_path / "disk" / "group_0001" / "pairs").is_dir()


@pytest.mark.parametrize("asked", [0, 4, 4.0, "4"])
def test_a_group_is_a_whole_number_however_it_is_written(gateway: Gateway, asked: Any) -> None:
    results = gateway.preprocess(gateway.image("a.png"), asked, True)
    assert {(type(entry["group_id"]), entry["group_id"]) for entry in results} == {
        (int, int(asked))
    }
    assert (gateway.out / f"group_{int(asked):04d}").is_dir()


@pytest.mark.parametrize("asked", ["adian", None, 5, ["adain"]])
def test_an_unknown_alignment_is_none_with_a_warning(gateway: Gateway, asked: Any) -> None:
    body = {"input_paths": [str(gateway.image("a.png"))], "align_method": asked}
    reply = gateway.post("/super_resolution_batch", body)
    assert reply["results"][0]["success"] is True
    expected = f"align_method is {asked!r}; expected one of adain, wavelet, nofix: took nofix"
    assert reply["warning"] == expected
    known = gateway.post("/super_resolution_batch", body | {"align_method": "wavelet"})
    assert "warning" not in known
    aligned = [inputs["ALIGN"].tolist() for _, inputs in gateway.stub.calls]
    assert aligned == [[b"nofix"], [b"wavelet"]]


def test_a_path_twice_in_a_batch_is_made_once_and_succeeds_twice(gateway: Gateway) -> None:
    path = gateway.image("a.png")
    body = {"input_paths": [str(path), f"{gateway.data}/../data/a.png", str(path)]}
    results = gateway.post("/super_resolution_batch", body)["results"]
    made = {"success": True, "output_path": str(gateway.out / "osediff" / "a.png")}
    assert results == [made] * 3
    assert [len(inputs["IMAGES"]) for _, inputs in gateway.stub.calls] == [1]


def test_a_malformed_entry_fails_alone(gateway: Gateway) -> None:
    path = str(gateway.image("a.png"))
    body = {"input_paths": [5, path, "", "\0.png"]}
    results = gateway.post("/super_resolution_batch", body)["results"]
    assert [entry["success"] for entry in results] == [False, True, False, False]
    assert results[0]["error"] == "the entry is 5; input should be a valid string"
    pairs = [None, {"pair_image": path, "interval": 2}, {"pair_image": 7, "interval": 3}]
    results = gateway.post("/evaluate_pairs", {"pairs_data": pairs})["results"]
    assert [entry.get("interval") for entry in results] == [None, 2, None]
    assert "pair_image is 7" in results[2]["error"]
    results = gateway.post("/generate_descriptions", {"image_paths": [path, {}, "\0"]})["results"]
    assert [bool(entry["description"]) for entry in results] == [True, False, False]
    wide = split("a", 1, main_params=camera(vfov=150.0))
    lost = {name: value for name, value in split("a", 1).items() if name != "rand_params"}
    results = interpolate(gateway, [wide, split("a", 2), lost], 1)
    assert [len(entry["interpolated_images"]) for entry in results] == [0, 1, 0]
    assert "main_params.vfov is 150.0" in results[0]["error"]
    assert "rand_params is missing" in results[2]["error"]


def test_fewer_than_no_views_are_none(gateway: Gateway) -> None:
    (result,) = interpolate(gateway, [split("a", 1)], -1)
    assert result["success"] is True
    assert result["interpolated_images"] == []


def test_what_else_a_camera_holds_comes_back(gateway: Gateway) -> None:
    ends = {"main_params": camera() | {"name": "x"}, "rand_params": camera() | {"seen": [1, None]}}
    (result,) = interpolate(gateway, [split("a", 1, **ends)], 1)
    assert {name: result[name] for name in ends} == ends


def test_a_call_holds_the_largest_group(gateway: Gateway) -> None:
    paths = [str(gateway.image("a.png"))] * (2 * 8 * 257)
    for endpoint, body in (
        ("/super_resolution_batch", {"input_paths": paths}),
        ("/evaluate_pairs", {"pairs_data": [{"pair_image": path} for path in paths]}),
        ("/generate_descriptions", {"image_paths": paths}),
    ):
        assert len(gateway.post(endpoint, body)["results"]) == len(paths)
    (name,) = body
    error = gateway.post(endpoint, {name: [*paths, "x"]}, 400)["error"]
    assert "at most 4112 items" in error
    assert len(interpolate(gateway, [split("a", 1)] * 65, 0)) == 65


def test_images_by_path_may_be_as_small_as_tensors(gateway: Gateway) -> None:
    tiny, small = str(gateway.image("tiny.png", 8, 8)), str(gateway.image("small.png", 28, 28))
    (sharp,) = gateway.post("/super_resolution_batch", {"input_paths": [tiny]})["results"]
    assert read(sharp["output_path"]).shape == (16, 16, 3)
    pairs = [{"pair_image": small}, {"pair_image": tiny}]
    one, two = gateway.post("/evaluate_pairs", {"pairs_data": pairs})["results"]
    assert one["final_score"] == "0.8"
    assert "at least 28 px" in two["error"]


def test_a_long_batch_says_how_far_it_is(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [str(gateway.image(f"{i}.png", 64, 64)) for i in range(20)]
    with caplog.at_level("INFO", "panotriton.web.gateway"):
        gateway.post("/super_resolution_batch", {"input_paths": paths})
    first, last = caplog.messages
    assert re.fullmatch(
        r"super_resolution_batch: 16 of 20 images in \d+ s, about \d+ s to go", first
    )
    assert last.startswith("super_resolution_batch: 20 of 20 images")


def test_an_answer_that_is_due_has_what_is_done(tmp_path: Path) -> None:
    with Gateway(tmp_path, answer_within_s=1e-6) as gateway:
        paths = [str(gateway.image(f"{i}.png")) for i in range(6)]
        results = gateway.post("/super_resolution_batch", {"input_paths": paths})["results"]
        assert [entry["success"] for entry in results] == [True] * 4 + [False] * 2
        assert "not done within 1e-06 s" in results[4]["error"]
        assert sorted(path.name for path in (gateway.out / "osediff").iterdir()) == [
            f"{i}.png" for i in range(4)
        ]
        pairs = [{"pair_image": path, "interval": 1} for path in paths]
        results = gateway.post("/evaluate_pairs", {"pairs_data": pairs})["results"]
        assert [entry.get("interval") for entry in results] == [1] * 4 + [None] * 2


def test_jpeg_files_have_the_quality_that_was_asked_for(tmp_path: Path) -> None:
    for quality in (95, 40):
        (tmp_path / str(quality)).mkdir()
        with Gateway(tmp_path / str(quality), jpeg_quality=quality) as gateway:
            image = read(gateway.image("a.png").rename(gateway.data / "a.jpg"))
            body = {"input_paths": [str(gateway.data / "a.jpg")]}
            (entry,) = gateway.post("/super_resolution_batch", body)["results"]
            sharp = cv2.cvtColor(image.repeat(2, axis=0).repeat(2, axis=1), cv2.COLOR_RGB2BGR)
            expected = cv2.imencode(".jpg", sharp, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
            assert Path(entry["output_path"]).read_bytes() == expected.tobytes()


@pytest.mark.parametrize("failure", [ConnectError("gone"), ModelUnavailable("not loaded yet")])
def test_a_request_waits_for_a_server_that_is_away(tmp_path: Path, failure: Exception) -> None:
    with Gateway(tmp_path, wait_s=60.0) as gateway:
        gateway.stub.failure, gateway.stub.away = failure, 2
        assert len(gateway.preprocess(gateway.image("a.png"), 1, True)) == 8
        assert len(gateway.stub.calls) == 3


def test_a_server_that_stays_away_is_503_and_says_when_to_ask_again(tmp_path: Path) -> None:
    with Gateway(tmp_path, wait_s=0.3) as gateway:
        gateway.stub.failure = ConnectError("gone")
        body = {"image_path": str(gateway.image("a.png")), "group_id": 1}
        reply = gateway.clients["preprocess"].post("/preprocess_for_group", json=body)
        assert reply.status_code == 503
        assert int(reply.headers["Retry-After"]) > 0
        assert len(gateway.stub.calls) > 1
        reply = gateway.clients["preprocess"].get("/health")
        assert int(reply.headers["Retry-After"]) > 0
        gateway.stub.failure = None
        reply = gateway.clients["preprocess"].get("/health")
        assert "Retry-After" not in reply.headers


def test_a_frozen_server_is_unhealthy_at_once(gateway: Gateway) -> None:
    gateway.stub.thawed.clear()
    for client in gateway.clients.values():
        assert client.get("/health").status_code == 503
    gateway.stub.thawed.set()
    assert gateway.clients["osediff"].get("/health").status_code == 200


def test_gateways_with_outputs_of_their_own_draw_cameras_of_their_own(tmp_path: Path) -> None:
    drawn = []
    for name in ("one", "two", "one"):
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with Gateway(folder, seed=None) as gateway:
            (entry, *_) = gateway.preprocess(gateway.image("a.png"), 1, True)
            drawn.append(entry["rand_params"])
    assert drawn[0] == drawn[2] != drawn[1]


# Fuzz


@pytest.fixture
def fuzzed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """A gateway whose opened files are checked at the end, with tempting links in its root."""
    with Gateway(tmp_path) as gateway:
        gateway.image("a.png")
        gateway.image("x.png").rename(gateway.outside / "x.png")
        (gateway.data / "link").symlink_to(gateway.outside)
        (gateway.data / "x.png").symlink_to(gateway.outside / "x.png")
        before = sorted(gateway.outside.rglob("*"))
        gateway.spy = Spy()
        with monkeypatch.context() as patch:
            patch.setattr("panotriton.web.gateway.paths.os.open", gateway.spy)
            yield gateway
        for path in gateway.spy.opened:
            assert path.is_relative_to(gateway.data) or path.is_relative_to(gateway.out)
        for path in gateway.spy.passed:
            assert gateway.data.is_relative_to(path) or gateway.out.is_relative_to(path)
        assert sorted(gateway.outside.rglob("*")) == before


PARTS = st.sampled_from(
    ["..", ".", "", "a.png", "x.png", "link", "data", "out", "outside", "\0", "é"]
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.lists(PARTS, max_size=5), min_size=3, max_size=3))
@example([["a.png"], ["..", "data", "a.png"], ["new"]])
@example([["a.png"], ["x.png"], ["link", "new"]])
def test_no_path_leads_outside(fuzzed: Gateway, parts: list[list[str]]) -> None:
    """Every path field of every endpoint, with paths that go through links and up."""
    start = fuzzed.data.parent
    one, two, three = (str(start / "data") + "/" + "/".join(part) for part in parts)
    bodies: dict[str, Any] = {
        "/preprocess_for_group": {"image_path": one, "group_id": 1},
        "/super_resolution_batch": {"input_paths": [one, two], "output_dir": three},
        "/evaluate_pairs": {"pairs_data": [{"pair_image": one}, {"super_resolved": two}]},
        "/generate_descriptions": {"image_paths": [one, two, three]},
        "/generate_interpolated_images": {
            "split_results": [split("a", 1, left_image=three)],
            "panorama1_path": one,
            "panorama2_path": two,
            "group_id": 1,
        },
    }
    for endpoint, body in bodies.items():
        reply = fuzzed.client(endpoint).post(endpoint, json=body)
        assert reply.status_code in (200, 400, 403), reply.text
    if parts == [["a.png"], ["x.png"], ["link", "new"]]:
        assert fuzzed.data / "a.png" in fuzzed.spy.opened


@pytest.mark.parametrize("service", ["preprocess", "osediff", "quality"])
def test_no_request_that_the_api_page_allows_or_not_is_a_500(fuzzed: Gateway, service: str) -> None:
    schema = schemathesis.openapi.from_dict(fuzzed.apps[service].openapi())
    schema.app = fuzzed.apps[service]
    for result in schema.get_all_operations():
        strategy = st.one_of(result.ok().as_strategy(mode) for mode in schemathesis.GenerationMode)

        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def probe(case: Any) -> None:
            response = case.call()
            assert response.status_code < 500, (case.as_curl_command(), response.text)
            assert response.status_code == 200 or set(response.json()) == {"error"}

        probe()
