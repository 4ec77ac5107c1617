"""From arguments to requests and from answers to results, without a server."""

import ast
import asyncio
import json
import math
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from tritonclient.utils import InferenceServerException

import panotriton
from panotriton.client import calls, wire
from panotriton.client.client import Client
from panotriton.client.conversation import finished, waits
from panotriton.client.pixels import Images
from panotriton.client.shared_memory import layout
from panotriton.client.transports import TRANSPORTS, Transport, transport
from panotriton.client.transports.base import Witness
from panotriton.client.twins import iterate, resolved, run
from panotriton.errors import (
    ConnectError,
    InferenceFailed,
    InvalidImage,
    InvalidInput,
    ModelUnavailable,
    PanotritonError,
    RequestTimeout,
    ServerBusy,
    ServerUnavailable,
    brief,
)
from panotriton.pipeline.camera import Camera
from panotriton.pipeline.contract import DEFAULTS, Options
from panotriton.pipeline.events import Done, Scored, View, event_from_tensors
from panotriton.pipeline.results import StageTime, Timings, Upscaled

SR = {"options": DEFAULTS}


def image(height: int, width: int, value: int = 0) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_a_list_is_grouped_by_size_and_comes_back_in_order() -> None:
    images = [image(16, 16, 1), image(8, 24, 2), image(16, 16, 3)]
    plan = calls.upscale(images, **SR)
    assert [call.inputs["IMAGES"].shape for call in plan.calls] == [(2, 16, 16, 3), (1, 8, 24, 3)]
    answers = [
        call.decode({"IMAGES_SR": call.inputs["IMAGES"].joined()}, Timings(1))
        for call in plan.calls
    ]
    assert [int(result.numpy()[0, 0, 0]) for result in plan.merge(answers)] == [1, 2, 3]


def test_large_batches_are_split_under_the_servers_limits() -> None:
    pairs = [image(32, 64)] * 130
    sizes = [call.inputs["IMAGES"].shape[0] for call in calls.score(pairs).calls]
    assert sizes == [64, 64, 2]
    blank = np.broadcast_to(np.uint8(0), (2048, 4096, 3))  # 33.5 MP each at twice the size
    sizes = [call.inputs["IMAGES"].shape[0] for call in calls.upscale([blank] * 24, **SR).calls]
    assert sizes == [20, 4]  # 671 MP per request
    small = np.broadcast_to(np.uint8(0), (8, 800, 3))  # enlarged to 512×51200 on the way
    sizes = [call.inputs["IMAGES"].shape[0] for call in calls.upscale([small] * 26, **SR).calls]
    assert sizes == [25, 1]


def test_one_image_is_one_result_and_no_image_is_none() -> None:
    plan = calls.upscale(image(16, 16), **SR)
    (call,) = plan.calls
    answer = call.decode({"IMAGES_SR": image(32, 32)[None]}, Timings(1))
    assert isinstance(plan.merge([answer]), Upscaled)
    assert calls.upscale([], **SR).merge([]) == []


@pytest.mark.parametrize("failure", [InvalidInput("x"), InferenceFailed("x")])
def test_a_request_that_fails_leaves_the_others_their_results(failure: PanotritonError) -> None:
    plan = calls.upscale([image(16, 16, 1), image(8, 24, 2), image(16, 16, 3)], **SR)

    def send(call: calls.Call[list[Upscaled]]) -> list[Upscaled]:
        if call.inputs["IMAGES"].shape[1] == 16:
            raise failure
        return call.decode({"IMAGES_SR": call.inputs["IMAGES"].joined()}, Timings(1))

    first, second, third = plan.outcomes(send)
    assert first is third is failure
    assert int(second.numpy()[0, 0, 0]) == 2


@pytest.mark.parametrize("error", [ServerBusy("x"), ConnectError("x"), ModelUnavailable("x")])
def test_what_concerns_the_server_fails_them_all(error: PanotritonError) -> None:
    def send(call: calls.Call[list[Upscaled]]) -> list[Upscaled]:
        raise error

    with pytest.raises(type(error)):
        calls.upscale([image(16, 16)], **SR).outcomes(send)


def test_one_tensor_is_one_request_however_large() -> None:
    batch = np.zeros((70, 28, 28, 3), np.uint8)
    plan = calls.score(Images((batch,), alone=True))
    (call,) = plan.calls
    assert call.inputs["IMAGES"].joined() is batch
    assert plan.places == (tuple(range(70)),)


def test_a_wrong_image_of_a_list_is_named() -> None:
    with pytest.raises(InvalidImage, match=r"images\[1\] is float32"):
        calls.upscale([image(8, 8), image(8, 8).astype(np.float32)], **SR)
    with pytest.raises(InvalidImage, match="image is 8×7 px; expected at least 8"):
        calls.upscale(image(7, 8), **SR)
    with pytest.raises(InvalidImage, match="at least 28"):
        calls.describe(image(27, 64))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"upscale": 5}, "upscale is 5; expected 1 to 4"),
        ({"align": "x"}, "align is 'x'; expected one of adain"),
        ({"prompt": "caf\udce9"}, "prompt is .*; expected text that UTF-8 can write: character 3"),
    ],
)
def test_options_are_checked_before_anything_is_sent(option: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        calls.upscale(image(8, 8), options=Options(**option))  # type: ignore[arg-type]


def test_what_the_server_says_of_an_input_is_told_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PILImage.fromarray(image(64, 64)).save(path)
    files = calls.crop(path, Camera(0, 0, 0, 90, 0), size=64).calls[0].files
    for said in ("ENCODED is broken", "in ensemble 'one', ENCODED is broken"):
        told = calls.naming_file(InvalidInput(said), files)
        assert isinstance(told, InvalidImage)
        assert str(told) == f"{brief(path)} is broken"
    for error in (InvalidInput("CAMERAS is broken"), InferenceFailed("ENCODED is broken")):
        assert calls.naming_file(error, files) is error
    pixels = calls.crop(image(64, 64), Camera(0, 0, 0, 90, 0), size=64)
    assert not pixels.calls[0].files


def test_a_crop_of_each_camera() -> None:
    camera = Camera(10, 0, 0, 90, 0)
    one, several = (calls.crop(image(64, 64), c, size=64) for c in (camera, [camera] * 3))
    assert (one.single, several.single) == (True, False)
    assert several.calls[0].inputs["CAMERAS"].shape == (3, 5)
    assert several.calls[0].outputs == {"CROPS": 3 * 64 * 64 * 3}
    with pytest.raises(InvalidInput, match="cameras holds a float"):
        calls.crop(image(64, 64), [1.0], size=64)
    with pytest.raises(InvalidInput, match="size is 63; expected 64 to 2048"):
        calls.crop(image(64, 64), camera, size=63)


def test_a_result_as_picture_array_and_tensor() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    result = Upscaled(pixels, Timings(1), "osediff")
    assert result.numpy() is pixels
    np.testing.assert_array_equal(np.asarray(result.image), pixels)
    tensor = result.torch()
    assert tensor.shape == (3, 8, 16)
    assert tensor.dtype == torch.float32
    (call,) = calls.upscale(tensor, **SR).calls  # what comes out goes in again
    np.testing.assert_array_equal(call.inputs["IMAGES"].joined()[0], pixels)


def test_torch_is_not_imported_for_those_who_hold_no_tensor() -> None:
    code = (
        "import sys, numpy as np, panotriton, panotriton.cli; from panotriton.client import calls;"
        "calls.score(np.zeros((32, 64, 3), np.uint8)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_image_tensors_of_known_size_lie_in_memory() -> None:
    call = calls.infer(
        "echo",
        {"A": image(8, 8), "B": np.zeros(3), "C": np.zeros((0, 4, 3), np.uint8)},
        {"OUT": 100, "TEXT": 0},
    )
    places = layout(call)
    assert set(places.inputs) == {"A"}
    assert set(places.outputs) == {"OUT"}
    assert places.outputs["OUT"].offset == 192
    assert places.nbytes == 192 + 128  # each rounded up to 64


def test_the_parts_of_a_tensor_are_joined_where_they_go() -> None:
    images = Images((image(2, 3, 1), image(2, 3, 2)))
    assert images.shape == (2, 2, 3, 3)
    assert images.nbytes == images.joined().nbytes
    assert Images((image(2, 3),), alone=True).shape == (2, 3, 3)


def stage(requests: int, request_ms: float, queue_ms: float) -> StageTime:
    return StageTime("m", 0, 0, queue_ms, 0.0, requests, request_ms)


def test_timings_are_exact_or_none() -> None:
    before = stage(3, 100, 10)
    exact = wire.timings(50, before, stage(4, 130, 12))
    assert exact == Timings(50, queue_ms=2, compute_ms=28, network_ms=20)
    assert wire.timings(50, before, stage(5, 160, 12)) == Timings(50)
    assert wire.timings(50, None, None) == Timings(50)


def speaking(protocol: str, *, asynchronous: bool = False) -> Transport:
    speaks = transport(protocol, asynchronous=asynchronous)
    return speaks("host:1", False, {"Authorization": "Bearer x"})


def answered(status: str) -> InferenceServerException:
    return InferenceServerException("x", status=status)


A_PROXYS = InferenceServerException(
    "Received http2 header with status: 404", status="StatusCode.UNIMPLEMENTED"
)


class RpcError(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INVALID_ARGUMENT

    def details(self) -> str:
        return "IMAGES is wrong"


@pytest.mark.parametrize(
    ("protocol", "error", "live", "kind"),
    [
        ("grpc", answered("StatusCode.INVALID_ARGUMENT"), True, InvalidInput),
        ("http", answered("400"), True, InvalidInput),
        ("grpc", answered("StatusCode.NOT_FOUND"), True, ModelUnavailable),
        ("http", answered("404"), True, ModelUnavailable),
        ("grpc", answered("StatusCode.UNAVAILABLE"), True, ServerBusy),
        ("grpc", answered("StatusCode.UNAVAILABLE"), False, ConnectError),
        ("http", answered("503"), True, ServerBusy),
        ("http", answered("503"), False, ConnectError),
        ("grpc", answered("StatusCode.RESOURCE_EXHAUSTED"), False, ServerBusy),
        ("http", answered("429"), False, ServerBusy),
        ("grpc", answered("StatusCode.DEADLINE_EXCEEDED"), True, RequestTimeout),
        ("http", answered("499"), True, RequestTimeout),
        ("http", answered("504"), True, RequestTimeout),
        ("grpc", answered("StatusCode.INTERNAL"), True, InferenceFailed),
        ("http", answered("500"), True, InferenceFailed),
        ("grpc", A_PROXYS, False, ConnectError),
        ("grpc", InferenceServerException("x"), True, InferenceFailed),  # inside a stream
        ("grpc", ConnectionRefusedError("x"), False, ConnectError),
        ("http", ConnectionRefusedError("x"), True, ConnectError),  # it may have begun
        ("grpc", TimeoutError("x"), False, RequestTimeout),
        ("grpc", RpcError(), True, InvalidInput),
    ],
)
def test_errors_follow_the_status_code(
    protocol: str, error: Exception, live: bool, kind: type[PanotritonError]
) -> None:
    seen = Witness(live, live, known=False, waited_s=2.5)
    assert type(speaking(protocol).mapped(error, seen)) is kind
    assert isinstance(error, speaking(protocol).failures)


@pytest.mark.parametrize(
    ("protocol", "error", "kind"),
    [
        ("http", ("Stub process 'osediff_0_0' is not healthy.", "500"), ServerUnavailable),
        ("grpc", ("a: Stub process 'a_0' is not healthy.", None), ServerUnavailable),  # a stream's
        ("grpc", ("Request for 'x' has no available versions", "NOT_FOUND"), ServerUnavailable),
        ("grpc", ("Server is stopping", "UNAVAILABLE"), ServerUnavailable),
        ("grpc", ("Server exiting", "UNAVAILABLE"), ServerUnavailable),
        (
            "grpc",
            ("osediff: Error when running inference: Server not ready", "INTERNAL"),
            ServerUnavailable,
        ),
        (
            "http",
            ("osediff: Error when running inference: Server not ready", "500"),
            ServerUnavailable,
        ),
        ("grpc", ("Exceeds maximum queue size", "UNAVAILABLE"), ServerBusy),
        ("grpc", ("Socket closed", "UNAVAILABLE"), ServerUnavailable),  # though another lives there
        ("grpc", ("cancelled", "CANCELLED"), ServerUnavailable),
        ("http", ("bad gateway", "502"), ServerUnavailable),
        ("grpc", ("received metadata size exceeds hard limit", "RESOURCE_EXHAUSTED"), InvalidInput),
        ("grpc", ("rate limit", "RESOURCE_EXHAUSTED"), ServerBusy),
    ],
)
def test_the_servers_trouble_is_told_from_the_callers(
    protocol: str, error: tuple[str, str | None], kind: type[PanotritonError]
) -> None:
    words, status = error
    if status and protocol == "grpc":
        status = f"StatusCode.{status}"
    seen = Witness(live=True, ready=True, known=True, waited_s=1)
    failure = InferenceServerException(words, status=status)
    assert type(speaking(protocol).mapped(failure, seen)) is kind


def test_a_live_server_that_is_not_ready_is_in_trouble() -> None:
    seen = Witness(live=True, ready=False, known=True, waited_s=1)
    for protocol, status in (("grpc", "StatusCode.UNAVAILABLE"), ("http", "503")):
        found = speaking(protocol).mapped(answered(status), seen)
        assert isinstance(found, ServerUnavailable)
        assert "starts or stops" in str(found)


def test_only_what_was_sent_can_be_lost() -> None:
    seen = Witness(live=False, ready=False, known=True, waited_s=1)

    def lost(protocol: str, error: BaseException) -> bool:
        found = speaking(protocol).mapped(error, seen)
        assert isinstance(found, ServerUnavailable)
        return found.lost

    gone = InferenceServerException("Socket closed", status="StatusCode.UNAVAILABLE")
    refused = InferenceServerException(
        "failed to connect to all addresses", status="StatusCode.UNAVAILABLE"
    )
    assert lost("grpc", gone)
    assert not lost("grpc", refused)
    assert lost("http", ConnectionResetError())
    assert not lost("http", ConnectionRefusedError())


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (ServerBusy("full"), 5),
        (ServerUnavailable("stops"), 5),
        (ServerUnavailable("gone", lost=True), 2),  # not a third time
        (ConnectError("never met"), 1),
        (RequestTimeout("late"), 1),
        (InvalidInput("wrong"), 1),
        (InferenceFailed("failed"), 1),
    ],
)
def test_what_is_sent_again_and_how_often(
    error: PanotritonError, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    def fail(*arguments: Any) -> None:
        sent.append(1)
        raise error

    with Client("127.0.0.1:1", retries=4) as client:
        client._reached = True
        monkeypatch.setattr(client._transport, "sleep", lambda seconds: None)
        monkeypatch.setattr(client, "_exchange", fail)
        with pytest.raises(type(error), match=str(error)):
            client.upscale(image(8, 8))
    assert len(sent) == tries


def test_the_time_allowed_follows_the_work() -> None:
    small, large = (calls.upscale(image(side, side), **SR).calls[0].timeout_s for side in (8, 1024))
    assert small == pytest.approx(300, abs=1)
    assert large == pytest.approx(300 + 20 * 4 * 1024**2 / 1e6)
    (one,) = calls.score(image(64, 128)).calls
    (two,) = calls.score([image(64, 128)] * 2).calls
    assert (one.timeout_s, two.timeout_s) == pytest.approx((300 + 0.2 * 512, 300 + 0.4 * 512))


def test_memory_is_used_again_only_when_the_server_has_answered() -> None:
    assert finished(InvalidInput("x"))
    for error in (RequestTimeout("x"), ConnectError("x"), KeyboardInterrupt()):
        assert not finished(error)


@pytest.mark.parametrize("protocol", TRANSPORTS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_headers_and_time_limits_reach_both_protocols(protocol: str, asynchronous: bool) -> None:
    speaks = speaking(protocol, asynchronous=asynchronous)
    options = speaks.call_options(2.5)
    assert options["headers"] == {"authorization": "Bearer x"}  # gRPC takes lower case only
    assert options["timeout"] == 2_500_000  # µs
    assert ("client_timeout" in options) == (protocol == "grpc")


def test_only_the_registry_tells_protocols_apart() -> None:
    package = Path(panotriton.__file__).parent
    for path in (*package.glob("client/**/*.py"), *package.glob("cli/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                compared = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not compared & set(TRANSPORTS), f"{path}:{node.lineno}"


async def count(ended: list[str], *, suspends: bool = False) -> AsyncGenerator[int, None]:
    try:
        for number in range(3):
            yield await resolved(asyncio.sleep(0, number) if suspends else number)
    finally:
        ended.append("ended")


def test_one_coroutine_serves_both_clients() -> None:
    ended: list[str] = []
    assert list(iterate(count(ended))) == [0, 1, 2]
    left = iterate(count(ended))
    assert next(left) == 0
    left.close()  # type: ignore[attr-defined]
    assert ended == ["ended"] * 2  # at once, not when it is collected

    async def both() -> list[int]:
        assert list(iterate(count(ended))) == [0, 1, 2]  # with a loop around, too
        return [number async for number in count(ended, suspends=True)]

    assert asyncio.run(both()) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="waits for an event loop"):
        run(asyncio.sleep(0))


def test_retries_wait_longer_each_time() -> None:
    first, second, third = waits(3)
    assert 0.125 <= first <= 0.375
    assert 0.25 <= second <= 0.75
    assert 0.5 <= third <= 1.5
    assert list(waits(0)) == []


def event(kind: str, **content: object) -> np.ndarray:
    return np.array([json.dumps({"event": kind, "done": 1, "total": 4, **content})], np.object_)


def test_events_are_read() -> None:
    scored = {"panorama": 1, "interval": 3, "scores": [0.5, None, 0, 0, 0, 0.7], "raw_reply": "r"}
    got = event_from_tensors({"EVENT": event("scored", **scored)})
    assert isinstance(got, Scored)
    assert got.quality.final_score == 0.7
    assert got.raw == "r"
    assert math.isnan(got.quality.balance)
    tensors = {
        "EVENT": event("view", panorama=2, interval=3, weight_idx=1),
        "IMAGES": image(4, 4)[None],
        "CAMERAS": np.array([[1.0, 2.0, 3.0, 90.0, 0.5]]),
    }
    view = event_from_tensors(tensors)
    assert isinstance(view, View)
    assert view.camera == Camera(1, 2, 3, 90, 0.5)
    done = event_from_tensors({"EVENT": event("done", kept=[1, 2])})
    assert isinstance(done, Done)
    assert (done.done, done.total, done.kept) == (1, 4, (1, 2))
    with pytest.raises(InvalidInput, match="SEED is wrong"):
        event_from_tensors({"EVENT": event("refused", message="SEED is wrong")})
    with pytest.raises(InferenceFailed, match="no memory"):
        event_from_tensors({"EVENT": event("failed", message="no memory")})


def test_what_only_a_network_would_refuse_is_refused_at_the_door_by_name() -> None:
    fine, thin = image(28, 56), image(28, 5880)
    for ask in (calls.score, calls.describe):
        with pytest.raises(InvalidImage, match=r"images\[1\] is 5880×28 px; expected one side at"):
            ask([fine, thin])
    calls.score(image(28, 5600))
    with pytest.raises(
        InvalidImage, match=r"images\[1\] would be super-resolved at 1280000×512 px"
    ):
        calls.upscale([fine, image(8, 20_000)], **SR)


def test_a_grey_picture_is_sent_as_rgb() -> None:
    (call,) = calls.upscale(PILImage.new("L", (64, 64), 9), **SR).calls
    np.testing.assert_array_equal(call.inputs["IMAGES"].joined(), image(64, 64, 9)[None])
