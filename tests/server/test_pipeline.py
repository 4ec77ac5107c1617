"""The whole pipeline on a real tritonserver, asked with plain tritonclient over both protocols."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from panotriton.pipeline.camera import Camera, crop, sample_cameras
from panotriton.pipeline.group import interpolate_cameras
from panotriton.server.launch import LocalServer

RNG = np.random.default_rng(0)
NAN = float("nan")
OUTPUTS = (
    "CAMERAS",
    "PAIRS",
    "PAIRS_SR",
    "SCORE",
    "SUB_SCORES",
    "RAW_OUTPUT",
    "KEPT",
    "DESCRIPTION",
    "DESCRIPTION_ERROR",
    "INTERPOLATED",
    "INTERPOLATED_CAMERAS",
    "INTERPOLATED_SR",
)
Tensors = dict[str, np.ndarray]
SMALLEST = {"CROP_SIZE": np.array([64], np.int32), "NUM_INTERPOLATIONS": np.array([1], np.int32)}


class Plain:
    """A tritonclient of either protocol: arrays in, arrays out."""

    def __init__(self, wire: ModuleType, url: str) -> None:
        self.wire = wire
        timeouts = {"network_timeout": 300.0} if wire is tritonclient.http else {}
        self.connection = wire.InferenceServerClient(url, **timeouts)

    def infer(self, model: str, inputs: Tensors, outputs: tuple[str, ...]) -> Tensors:
        tensors = []
        for name, value in inputs.items():
            tensor = self.wire.InferInput(name, value.shape, np_to_triton_dtype(value.dtype))
            tensor.set_data_from_numpy(value)
            tensors.append(tensor)
        wanted = [self.wire.InferRequestedOutput(name) for name in outputs]
        result = self.connection.infer(model, tensors, outputs=wanted)
        return {name: result.as_numpy(name) for name in outputs}


@pytest.fixture(scope="module", params=["grpc", "http"])
def plain(request: pytest.FixtureRequest, server: LocalServer) -> Any:
    if request.param == "grpc":
        client = Plain(tritonclient.grpc, server.grpc_url)
    else:
        client = Plain(tritonclient.http, server.http_url)
    yield client
    client.connection.close()


def group_inputs(panoramas: tuple[np.ndarray, np.ndarray], **options: np.ndarray) -> Tensors:
    """A small group: 128 px crops and two in-between views, so that a test takes seconds."""
    return {
        "PANORAMA_1": panoramas[0],
        "PANORAMA_2": panoramas[1],
        "CROP_SIZE": np.array([128], np.int32),
        "NUM_INTERPOLATIONS": np.array([2], np.int32),
        "SEED": np.array([7]),
        **options,
    }


def threshold(value: float) -> np.ndarray:
    return np.array([value], np.float32)


def text(value: str) -> np.ndarray:
    return np.array([value.encode()], np.object_)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def assert_same_picture(one: np.ndarray, other: np.ndarray) -> None:
    """Equal but for rounding: in a batch of another size the networks' sums end in other bits."""
    assert one.shape == other.shape
    if one.size:
        assert np.abs(one.astype(np.int16) - other).max() <= 1


def test_a_group_end_to_end(plain: Plain, panoramas: tuple[np.ndarray, np.ndarray]) -> None:
    got = plain.infer("panorama", group_inputs(panoramas, THRESHOLD=threshold(0)), OUTPUTS)
    np.testing.assert_array_equal(got["CAMERAS"], sample_cameras(7))
    assert got["PAIRS"].shape == (16, 128, 256, 3)
    left = Camera.from_array(got["CAMERAS"][1, 2, 0])
    np.testing.assert_array_equal(got["PAIRS"][10][:, :128], crop(panoramas[1], left, 128))
    assert got["PAIRS_SR"].shape == (16, 256, 512, 3)
    assert got["SCORE"].shape == (16,)
    assert got["SUB_SCORES"].shape == (16, 5)
    assert all(b"Final Score" in reply for reply in got["RAW_OUTPUT"])
    kept = got["KEPT"]
    assert kept.tolist() == list(range(1, 9))
    assert got["INTERPOLATED"].shape == (8 * 2 * 2, 128, 128, 3)
    assert got["INTERPOLATED_SR"].shape == (8 * 2 * 2, 256, 256, 3)
    between = interpolate_cameras(got["CAMERAS"], kept, 2)
    np.testing.assert_array_equal(got["INTERPOLATED_CAMERAS"], between)
    assert all(reply.strip() for reply in got["DESCRIPTION"])
    assert not any(got["DESCRIPTION_ERROR"])


def test_super_resolution_keeps_the_picture(
    plain: Plain, panoramas: tuple[np.ndarray, np.ndarray]
) -> None:
    outputs = ("PAIRS", "PAIRS_SR")
    got = plain.infer("panorama", group_inputs(panoramas), outputs)
    for pair, sharp in zip(got["PAIRS"], got["PAIRS_SR"], strict=True):
        enlarged = cv2.resize(pair, (512, 256), interpolation=cv2.INTER_CUBIC)
        assert cv2.PSNR(enlarged, sharp) > 20


def test_no_interval_kept_is_a_normal_answer(
    plain: Plain, panoramas: tuple[np.ndarray, np.ndarray]
) -> None:
    got = plain.infer("panorama", group_inputs(panoramas, THRESHOLD=threshold(1)), OUTPUTS)
    assert got["KEPT"].shape == (0,)
    assert got["DESCRIPTION"].shape == (0,)
    assert got["INTERPOLATED"].shape == (0, 128, 128, 3)
    assert got["INTERPOLATED_CAMERAS"].shape == (0, 2, 2, 5)
    assert got["INTERPOLATED_SR"].shape == (0, 256, 256, 3)
    assert got["PAIRS_SR"].shape == (16, 256, 512, 3)


def test_the_same_seed_gives_the_same_bits(
    plain: Plain, panoramas: tuple[np.ndarray, np.ndarray]
) -> None:
    outputs = ("CAMERAS", "PAIRS")
    first, second = (plain.infer("panorama", group_inputs(panoramas), outputs) for _ in range(2))
    for name in outputs:
        assert first[name].tobytes() == second[name].tobytes()


def test_encoded_panoramas_give_the_same_group(
    plain: Plain, panoramas: tuple[np.ndarray, np.ndarray]
) -> None:
    files = [cv2.imencode(".png", cv2.cvtColor(p, cv2.COLOR_RGB2BGR))[1] for p in panoramas]
    inputs = group_inputs(panoramas, THRESHOLD=threshold(0.7)) | SMALLEST
    encoded = {k: v for k, v in inputs.items() if not k.startswith("PANORAMA")}
    encoded |= {f"ENCODED_{i}": np.array([f.tobytes()], np.object_) for i, f in enumerate(files, 1)}
    raw = plain.infer("panorama", inputs, OUTPUTS)
    got = plain.infer("panorama_encoded", encoded, OUTPUTS)
    for name in OUTPUTS:
        if name.endswith("_SR"):
            assert_same_picture(got[name], raw[name])
        else:
            np.testing.assert_array_equal(got[name], raw[name], err_msg=name)


def test_stages_that_no_output_needs_do_not_run(
    server: LocalServer, panoramas: tuple[np.ndarray, np.ndarray]
) -> None:
    client = Plain(tritonclient.http, server.http_url)
    before = executions(server, "osediff")
    client.infer("panorama", group_inputs(panoramas), ("PAIRS",))
    assert executions(server, "osediff") == before
    client.connection.close()


@pytest.fixture(scope="module")
def alone(
    server: LocalServer, panoramas: tuple[np.ndarray, np.ndarray]
) -> Iterator[dict[str, Future[Tensors]]]:
    """One request for each output, at once, so that their images share batches."""
    client = Plain(tritonclient.grpc, server.grpc_url)
    inputs = group_inputs(panoramas, THRESHOLD=threshold(0)) | SMALLEST
    with ThreadPoolExecutor(len(OUTPUTS)) as pool:
        yield {n: pool.submit(client.infer, "panorama", inputs, (n,)) for n in OUTPUTS}
    client.connection.close()


@pytest.mark.parametrize("name", OUTPUTS)
def test_any_output_can_be_asked_for_alone(alone: dict[str, Future[Tensors]], name: str) -> None:
    assert len(alone[name].result()[name]) in (2, 8, 16)


@pytest.mark.parametrize("mode", ["expected", "levels"])
def test_a_score_can_be_read_without_a_reply(plain: Plain, mode: str) -> None:
    pairs = noise(3, 64, 128, 3)
    outputs = ("SCORE", "SUB_SCORES", "RAW_OUTPUT")
    got = plain.infer("qwen_scorer", {"IMAGES": pairs, "MODE": text(mode)}, outputs)
    assert ((got["SCORE"] >= 0) & (got["SCORE"] <= 1.05)).all()
    assert np.isnan(got["SUB_SCORES"]).all()
    assert not any(got["RAW_OUTPUT"])
    for index in range(3):
        alone = {"IMAGES": pairs[index : index + 1], "MODE": text(mode)}
        single = plain.infer("qwen_scorer", alone, ("SCORE",))["SCORE"]
        np.testing.assert_allclose(single, got["SCORE"][index : index + 1], atol=1e-4)


IMAGES = {"IMAGES": noise(1, 64, 64, 3)}
PAIRS_SR = noise(16, 8, 16, 3)
FULL = np.full(16, 0.9, np.float32)
SPHERES = noise(2, 64, 64, 3)
CAMERAS = sample_cameras(0)


def bad_cameras() -> np.ndarray:
    cameras = CAMERAS.copy()
    cameras[1, 3, 0, 2] = NAN
    return cameras


PREPROCESS = {"PANORAMA_1": noise(64, 64, 3), "PANORAMA_2": noise(64, 64, 3), "SEED": np.array([1])}
SELECT = {"SCORE": FULL, "PAIRS_SR": PAIRS_SR}
INTERPOLATE = {"SPHERES": SPHERES, "CAMERAS": CAMERAS, "KEPT": np.array([1], np.int32)}
DECODE = {"ENCODED": np.array([cv2.imencode(".jpg", noise(64, 64, 3))[1].tobytes()], np.object_)}
GOOD = {
    "decode": (DECODE, ("IMAGE",)),
    "options": ({"CROP_SIZE": np.array([512], np.int32)}, ("CROP_SIZE",)),
    "preprocess": (PREPROCESS, ("PAIRS",)),
    "osediff": (IMAGES, ("IMAGES_SR",)),
    "qwen_scorer": (IMAGES, ("SCORE",)),
    "qwen_describer": (IMAGES, ("DESCRIPTION",)),
    "select": (SELECT, ("KEPT",)),
    "interpolate": (INTERPOLATE, ("INTERPOLATED",)),
}


def huge_png() -> bytes:
    """A valid PNG of 200 megapixels in 200 kB: a bomb, were it decoded."""
    return cv2.imencode(".png", np.zeros((10_000, 20_000), np.uint8))[1].tobytes()


def broken_jpeg() -> bytes:
    data = cv2.imencode(".jpg", noise(128, 128, 3))[1].tobytes()
    return data[: len(data) // 2]


# model, what is changed in a good request, what the error must say: the tensor, what was expected.
BAD = [
    ("decode", {"ENCODED": text("no image")}, ["ENCODED", "JPEG, PNG or WebP"]),
    ("decode", {"ENCODED": text("")}, ["ENCODED", "JPEG, PNG or WebP"]),
    (
        "decode",
        {"ENCODED": np.array([broken_jpeg()], np.object_)},
        ["ENCODED is a broken image", "send it again"],
    ),
    (
        "decode",
        {"ENCODED": np.array([huge_png()], np.object_)},
        ["ENCODED is 20000×10000 px", "200 megapixels; expected at most 134", "downsize"],
    ),
    ("preprocess", {"PANORAMA_1": noise(64, 64, 3).astype(np.float32)}, ["PANORAMA_1", "UINT8"]),
    ("preprocess", {"PANORAMA_1": noise(64, 64)}, ["PANORAMA_1", "[-1,-1,3]"]),
    ("preprocess", {"PANORAMA_2": noise(64, 64, 4)}, ["PANORAMA_2", "[-1,-1,3]"]),
    ("preprocess", {"PANORAMA_1": noise(0, 64, 3)}, ["PANORAMA_1 is 64×0", "at least 64 px"]),
    ("preprocess", {"PANORAMA_1": noise(63, 64, 3)}, ["PANORAMA_1 is 64×63", "enlarge it"]),
    ("preprocess", {"SEED": np.array([-1])}, ["SEED is -1", "expected 0 or more"]),
    ("preprocess", {"GIVEN_CAMERAS": CAMERAS}, ["SEED or GIVEN_CAMERAS", "exactly one"]),
    ("preprocess", {"SEED": None}, ["SEED or GIVEN_CAMERAS", "exactly one"]),
    (
        "preprocess",
        {"SEED": None, "GIVEN_CAMERAS": bad_cameras()},
        ["GIVEN_CAMERAS[1, 3, 0]: camera field roll is nan", "-90 to 90"],
    ),
    ("preprocess", {"CROP_SIZE": np.array([10], np.int32)}, ["CROP_SIZE is 10", "64 to 2048"]),
    ("osediff", {"IMAGES": noise(1, 64, 64, 3).astype(np.float32)}, ["IMAGES", "UINT8"]),
    ("osediff", {"IMAGES": noise(64, 64, 3)}, ["IMAGES", "[-1,-1,-1,3]"]),
    ("osediff", {"IMAGES": noise(1, 64, 64, 1)}, ["IMAGES", "[-1,-1,-1,3]"]),
    ("osediff", {"IMAGES": noise(1, 0, 64, 3)}, ["IMAGES is 64×0 px", "at least 8 px"]),
    ("osediff", {"UPSCALE": np.array([5], np.int32)}, ["UPSCALE is 5", "1 to 4"]),
    ("osediff", {"UPSCALE": np.array([-2], np.int32)}, ["UPSCALE is -2", "1 to 4"]),
    ("osediff", {"ALIGN": text("adian")}, ["ALIGN is 'adian'", "adain, wavelet, nofix"]),
    ("osediff", {"ALIGN": text("ä" * 20_000)}, ["ALIGN is 'ää", "…; expected one of adain"]),
    ("qwen_scorer", {"MODE": text("x" * 20_000)}, ["MODE is 'xx", "…; expected one of generate"]),
    ("osediff", {"PROMPT": np.array([b"\xff"], np.object_)}, ["PROMPT is not UTF-8"]),
    (
        "osediff",
        {"PROMPT": text("x" * 4097)},
        ["PROMPT has 4097 characters; expected at most 4096"],
    ),
    (
        "options",
        {"NUM_INTERPOLATIONS": np.array([41], np.int32)},
        ["656 in-between views of 1024×1024 px", "at most 671 megapixels", "(stream)"],
    ),
    ("osediff", {"IMAGES": noise(1, 8, 70_000, 3)}, ["IMAGES", "send smaller"]),
    ("qwen_scorer", {"IMAGES": noise(1, 64, 64, 4)}, ["IMAGES", "[-1,-1,-1,3]"]),
    ("qwen_scorer", {"IMAGES": noise(1, 8, 64, 3)}, ["IMAGES is 64×8 px", "at least 28 px"]),
    (
        "qwen_scorer",
        {"IMAGES": noise(1, 28, 5880, 3)},
        ["IMAGES is 5880×28 px", "at most 200 times"],
    ),
    ("qwen_describer", {"IMAGES": noise(1, 5880, 28, 3)}, ["IMAGES is 28×5880 px"]),
    ("decode", {"ENCODED": text("GIF89a")}, ["ENCODED is GIF, which is not read"]),
    ("qwen_scorer", {"MODE": text("guess")}, ["MODE is 'guess'", "generate, expected, levels"]),
    ("qwen_describer", {"IMAGES": noise(64, 64, 3)}, ["IMAGES", "[-1,-1,-1,3]"]),
    ("select", {"SCORE": FULL[:8]}, ["SCORE", "[16]"]),
    ("select", {"THRESHOLD": threshold(NAN)}, ["THRESHOLD is nan", "0 to 1"]),
    ("select", {"PAIRS_SR": noise(16, 0, 16, 3)}, ["PAIRS_SR is 16×0 px"]),
    ("interpolate", {"CAMERAS": bad_cameras()}, ["CAMERAS[1, 3, 0]", "roll is nan"]),
    (
        "interpolate",
        {"NUM_INTERPOLATIONS": np.array([-1], np.int32)},
        ["NUM_INTERPOLATIONS is -1", "0 to 255"],
    ),
    ("interpolate", {"KEPT": np.array([0], np.int32)}, ["KEPT is [0]", "1 to 8"]),
    ("interpolate", {"SPHERES": noise(2, 64, 32, 3)}, ["SPHERES", "(2, S, S, 3)"]),
    ("interpolate", {"SPHERES": noise(2, 0, 0, 3)}, ["SPHERES", "64 to 2048"]),
    ("interpolate", {"SPHERES": None}, ["SPHERE_1 and SPHERE_2, or SPHERES"]),
    ("interpolate", {"SPHERE_1": noise(64, 64, 3)}, ["SPHERE_1 and SPHERE_2, or SPHERES"]),
    (
        "interpolate",
        {"SPHERES": None, "SPHERE_1": noise(64, 64, 3), "SPHERE_2": noise(64, 8, 3)},
        ["SPHERE_2 is 8×64 px", "at least 64"],
    ),
    ("preprocess", {"SPHERE_SIZE": np.array([63], np.int32)}, ["SPHERE_SIZE is 63", "64 to 8192"]),
]


@pytest.mark.parametrize(("model", "change", "says"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_named_and_the_next_request_served(
    plain: Plain, model: str, change: dict[str, Any], says: list[str]
) -> None:
    good, outputs = GOOD[model]
    bad = {name: value for name, value in (good | change).items() if value is not None}
    refused(plain, model, bad, says)
    assert plain.infer(model, good, outputs)


def test_a_panorama_of_too_many_pixels_is_named(server: LocalServer) -> None:
    """By one protocol: 400 MB."""
    client = Plain(tritonclient.http, server.http_url)
    large = {"PANORAMA_1": np.zeros((8_250, 16_500, 3), np.uint8)}
    says = ["PANORAMA_1 is 16500×8250 px, 136 megapixels", "at most 134", "downsize"]
    refused(client, "preprocess", GOOD["preprocess"][0] | large, says)
    client.connection.close()


def refused(plain: Plain, model: str, inputs: Tensors, says: list[str]) -> None:
    with pytest.raises(InferenceServerException) as caught:
        plain.infer(model, inputs, GOOD[model][1])
    assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")
    for words in says:
        assert words in caught.value.message()


def test_spheres_of_two_sizes_are_no_one_tensor(plain: Plain) -> None:
    own = {"SPHERE_SIZE": np.array([0], np.int32), "PANORAMA_2": noise(64, 80, 3)}
    got = plain.infer("preprocess", PREPROCESS | own, ("SPHERE_1", "SPHERE_2"))
    np.testing.assert_array_equal(got["SPHERE_1"], PREPROCESS["PANORAMA_1"])
    np.testing.assert_array_equal(got["SPHERE_2"], own["PANORAMA_2"])
    with pytest.raises(InferenceServerException, match="hold 64×64 and 80×64 px"):
        plain.infer("preprocess", PREPROCESS | own, ("SPHERES",))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"SPHERE_SIZE": np.array([-1], np.int32)}, "SPHERE_SIZE is -1; expected 64 to 8192"),
        ({"ALIGN": text("x")}, "ALIGN is 'x'; expected one of adain"),
        ({"THRESHOLD": threshold(2)}, "THRESHOLD is 2.0; expected 0 to 1"),
        ({"NUM_INTERPOLATIONS": np.array([-1], np.int32)}, "NUM_INTERPOLATIONS is -1; expected 0"),
        ({"UPSCALE": np.array([0], np.int32)}, "UPSCALE is 0; expected 1 to 4"),
    ],
)
def test_a_bad_option_is_refused_before_any_work(
    plain: Plain,
    server: LocalServer,
    panoramas: tuple[np.ndarray, np.ndarray],
    option: Tensors,
    says: str,
) -> None:
    before = executions(server, "osediff")
    with pytest.raises(InferenceServerException, match=says):
        plain.infer("panorama", group_inputs(panoramas, **option), OUTPUTS)
    assert executions(server, "osediff") == before


@pytest.mark.parametrize("model", ["panorama", "panorama_encoded"])
def test_many_bad_requests_at_once_leave_the_server_alive(
    server: LocalServer, panoramas: tuple[np.ndarray, np.ndarray], model: str
) -> None:
    inputs = group_inputs(panoramas, ALIGN=text("x"))
    if model == "panorama_encoded":
        inputs = {k: v for k, v in inputs.items() if not k.startswith("PANORAMA")}
        inputs |= {"ENCODED_1": text("no image"), "ENCODED_2": DECODE["ENCODED"]}

    def ask(url_and_wire: tuple[str, ModuleType]) -> int:
        client = Plain(url_and_wire[1], url_and_wire[0])
        refused = 0
        for _ in range(25):
            with pytest.raises(InferenceServerException, match="expected"):
                client.infer(model, inputs, OUTPUTS)
            refused += 1
        client.connection.close()
        return refused

    roads = [(server.grpc_url, tritonclient.grpc), (server.http_url, tritonclient.http)] * 2
    with ThreadPoolExecutor(len(roads)) as pool:
        assert list(pool.map(ask, roads)) == [25] * 4


def executions(server: LocalServer, model: str) -> int:
    with tritonclient.http.InferenceServerClient(server.http_url) as client:
        (stats,) = client.get_inference_statistics(model)["model_stats"]
    return int(stats["execution_count"])


def test_no_images_are_no_error(plain: Plain) -> None:
    nothing = {"IMAGES": noise(0, 64, 64, 3)}
    assert plain.infer("osediff", nothing, ("IMAGES_SR",))["IMAGES_SR"].shape == (0, 128, 128, 3)
    scored = plain.infer("qwen_scorer", nothing, ("SCORE", "SUB_SCORES"))
    assert scored["SCORE"].shape == (0,)
    assert scored["SUB_SCORES"].shape == (0, 5)
    assert plain.infer("qwen_describer", nothing, ("DESCRIPTION",))["DESCRIPTION"].shape == (0,)


def test_concurrent_sizes_and_options_do_not_mix(server: LocalServer) -> None:
    """Six requests at once, bad ones among them, answer as they do alone."""
    requests = [
        {"IMAGES": noise(2, 96, 160, 3)},
        {"IMAGES": noise(1, 200, 300, 3), "ALIGN": text("wavelet")},
        {"IMAGES": noise(1, 64, 64, 3), "UPSCALE": np.array([9], np.int32)},
        {"IMAGES": noise(1, 80, 80, 3), "PROMPT": text("sharp, detailed")},
        {"IMAGES": noise(3, 96, 160, 3), "ALIGN": text("nofix")},
        {"IMAGES": noise(1, 130, 97, 3), "UPSCALE": np.array([4], np.int32)},
    ]

    def ask(inputs: Tensors) -> np.ndarray | str:
        client = Plain(tritonclient.grpc, server.grpc_url)
        try:
            return client.infer("osediff", inputs, ("IMAGES_SR",))["IMAGES_SR"]
        except InferenceServerException as error:
            return str(error.message())
        finally:
            client.connection.close()

    alone = [ask(inputs) for inputs in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(ask, requests))
    for one, other in zip(alone, together, strict=True):
        if isinstance(one, str):
            assert one == other
            continue
        assert isinstance(other, np.ndarray)
        assert_same_picture(one, other)
    assert isinstance(alone[2], str)
    assert "UPSCALE is 9" in alone[2]
