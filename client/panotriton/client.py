"""The client of the panorama pipeline: two panoramas in, a `Group` out, over gRPC or HTTP."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from panotriton.errors import (
    ConnectError,
    InferenceFailed,
    InvalidImage,
    InvalidInput,
    ModelUnavailable,
    PanotritonError,
    RequestTimeout,
    ServerBusy,
)
from panotriton.group import check_cameras
from panotriton.images import check_panorama, decode_image
from panotriton.results import Group, StageTime, group_from_tensors

__all__ = ["Client", "ImageLike"]

ImageLike = str | Path | PILImage.Image | NDArray[np.uint8]

_RESULTS = (
    "CAMERAS",
    "PAIRS_SR",
    "SCORE",
    "SUB_SCORES",
    "RAW_OUTPUT",
    "KEPT",
    "DESCRIPTION",
    "DESCRIPTION_ERROR",
    "INTERPOLATED_CAMERAS",
    "INTERPOLATED_SR",
)
_INTERMEDIATES = ("PAIRS", "INTERPOLATED")
_MAX_FILE_BYTES = 512 << 20

# Status codes of gRPC and HTTP → our errors. Unavailable is settled by asking whether it lives.
_ERRORS: dict[str, type[PanotritonError]] = {
    "StatusCode.INVALID_ARGUMENT": InvalidInput,
    "StatusCode.NOT_FOUND": ModelUnavailable,
    "StatusCode.RESOURCE_EXHAUSTED": ServerBusy,
    "400": InvalidInput,
    "404": ModelUnavailable,
}
_TIMED_OUT = ("StatusCode.DEADLINE_EXCEEDED", "499", "504")
_UNAVAILABLE = ("StatusCode.UNAVAILABLE", "503")


class Client:
    """A connection to a server that serves the `panorama` ensemble.

    url is "host:port" without a scheme; protocol is "grpc" (port 8001 by custom) or "http" (8000).
    Nothing is sent before the first call. Use one client a thread, in a `with` block.
    """

    def __init__(
        self, url: str = "localhost:8001", *, protocol: str = "grpc", timeout_s: float = 3600.0
    ) -> None:
        if protocol not in ("grpc", "http"):
            raise InvalidInput(f"protocol is {protocol!r}; expected 'grpc' or 'http'")
        if "://" in url:
            raise InvalidInput(f"url is {url!r}; expected host:port without a scheme")
        self.url = url
        self.protocol = protocol
        self._timeout_s = timeout_s
        self._wire = _import_wire(protocol)
        self._connection = self._connect()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; safe to call twice."""
        self._connection.close()

    def ready(self) -> bool:
        """Whether a server answers there and all its models are ready."""
        try:
            return bool(self._connection.is_server_ready())
        except (InferenceServerException, OSError):
            return False

    def process(
        self,
        panorama_1: ImageLike,
        panorama_2: ImageLike,
        *,
        seed: int | None = None,
        cameras: NDArray[np.float64] | None = None,
        crop_size: int = 512,
        upscale: int = 2,
        align: str = "adain",
        prompt: str = "",
        threshold: float = 0.7,
        interpolations: int = 9,
        intermediates: bool = False,
    ) -> Group:
        """Run the whole pipeline on two panoramas as one request.

        A panorama is the path of a JPEG, PNG or WebP file (sent as it is, decoded by the server), a
        PIL image, or a (H, W, 3) uint8 RGB array. Give `seed` (≥ 0) or `cameras` (2, 8, 2, 5), see
        `camera.sample_cameras`; with neither, the seed is 0. `intermediates` also fetches the
        images before super-resolution.

        Raises InvalidImage or InvalidInput for bad arguments, naming them; ConnectError,
        RequestTimeout, ServerBusy, ModelUnavailable or InferenceFailed for what the server says.
        """
        tensors = {
            "CROP_SIZE": np.array([crop_size], np.int32),
            "UPSCALE": np.array([upscale], np.int32),
            "ALIGN": np.array([align.encode()], np.object_),
            "PROMPT": np.array([prompt.encode()], np.object_),
            "THRESHOLD": np.array([threshold], np.float32),
            "NUM_INTERPOLATIONS": np.array([interpolations], np.int32),
        }
        tensors |= _camera_tensors(seed, cameras)
        model, images = _panorama_tensors(panorama_1, panorama_2)
        outputs = _RESULTS + (_INTERMEDIATES if intermediates else ())
        began = time.perf_counter()
        results = self.infer(model, images | tensors, outputs)
        return group_from_tensors(results, time.perf_counter() - began)

    def infer(
        self, model: str, inputs: Mapping[str, NDArray[Any]], outputs: tuple[str, ...]
    ) -> dict[str, NDArray[Any]]:
        """One request to any model of the server: named arrays in, the named outputs out."""
        wire = self._wire
        tensors = []
        for name, value in inputs.items():
            tensor = wire.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
            tensor.set_data_from_numpy(value)
            tensors.append(tensor)
        wanted = [wire.InferRequestedOutput(name) for name in outputs]
        try:
            result = self._connection.infer(model, tensors, outputs=wanted, **self._call_timeout())
        except (InferenceServerException, OSError) as error:
            raise self._mapped(error) from error
        return {name: result.as_numpy(name) for name in outputs}

    def statistics(self) -> dict[str, StageTime]:
        """Totals since the server started, by model name."""
        try:
            if self.protocol == "grpc":
                report = self._connection.get_inference_statistics(as_json=True)
            else:
                report = self._connection.get_inference_statistics()
        except (InferenceServerException, OSError) as error:
            raise self._mapped(error) from error
        return {entry["name"]: _stage_time(entry) for entry in report["model_stats"]}

    def _connect(self) -> Any:
        if self.protocol == "grpc":
            return self._wire.InferenceServerClient(self.url)
        timeout = {"connection_timeout": 10.0, "network_timeout": self._timeout_s}
        return self._wire.InferenceServerClient(self.url, **timeout)

    def _call_timeout(self) -> dict[str, float]:
        return {"client_timeout": self._timeout_s} if self.protocol == "grpc" else {}

    def _mapped(self, error: Exception) -> PanotritonError:
        status = error.status() if isinstance(error, InferenceServerException) else None
        if isinstance(error, TimeoutError) or status in _TIMED_OUT:
            return RequestTimeout(f"{self.url} did not answer within {self._timeout_s:g} s")
        if status is None or status in _UNAVAILABLE:
            if status is not None and self._live():
                return ServerBusy(f"{self.url}: {_message(error)}")
            return ConnectError(
                f"no server answers over {self.protocol} at {self.url} ({_message(error)}); "
                "start one with `panotriton serve`, or name another with --url"
            )
        return _ERRORS.get(status, InferenceFailed)(_message(error))

    def _live(self) -> bool:
        try:
            return bool(self._connection.is_server_live())
        except (InferenceServerException, OSError):
            return False


def _import_wire(protocol: str) -> ModuleType:
    # Imported on demand: each drags in its own network stack.
    if protocol == "grpc":
        import tritonclient.grpc as wire  # noqa: PLC0415
    else:
        import tritonclient.http as wire  # noqa: PLC0415
    return wire  # type: ignore[no-any-return]


def _message(error: Exception) -> str:
    text = error.message() if isinstance(error, InferenceServerException) else str(error)
    return (text or type(error).__name__).removeprefix("[request id: <id_unknown>] ").strip()


def _camera_tensors(
    seed: int | None, cameras: NDArray[np.float64] | None
) -> dict[str, NDArray[Any]]:
    if cameras is None:
        seed = 0 if seed is None else seed
        if not 0 <= seed < 2**63:
            raise InvalidInput(f"seed is {seed}; expected 0 to 2⁶³-1")
        return {"SEED": np.array([seed], np.int64)}
    if seed is not None:
        raise InvalidInput("seed and cameras are both given; give one of them")
    cameras = np.asarray(cameras, np.float64)
    check_cameras("cameras", cameras)
    return {"GIVEN_CAMERAS": cameras}


def _panorama_tensors(one: ImageLike, two: ImageLike) -> tuple[str, dict[str, NDArray[Any]]]:
    """The ensemble that takes these two, and its image inputs."""
    if isinstance(one, (str, Path)) and isinstance(two, (str, Path)):
        return "panorama_encoded", {"ENCODED_1": _file_bytes(one), "ENCODED_2": _file_bytes(two)}
    pixels = {"PANORAMA_1": _pixels("panorama_1", one), "PANORAMA_2": _pixels("panorama_2", two)}
    return "panorama", pixels


def _file_bytes(path: str | Path) -> NDArray[np.object_]:
    try:
        size = Path(path).stat().st_size
        if size > _MAX_FILE_BYTES:
            raise InvalidImage(f"{path} has {size} bytes; expected at most {_MAX_FILE_BYTES}")
        return np.array([Path(path).read_bytes()], np.object_)
    except OSError as error:
        raise InvalidImage(f"cannot read {path}: {error.strerror}") from error


def _pixels(name: str, image: ImageLike) -> NDArray[np.uint8]:
    if isinstance(image, (str, Path)):
        return decode_image(str(image), _file_bytes(image).item())
    if isinstance(image, PILImage.Image):
        if image.mode != "RGB":
            raise InvalidImage(f"{name} is a {image.mode} picture; expected RGB: .convert('RGB')")
        image = np.asarray(image)
    if not isinstance(image, np.ndarray):
        raise InvalidImage(
            f"{name} is a {type(image).__name__}; expected a path, a PIL image or a (H, W, 3) uint8 array"
        )
    check_panorama(name, image)
    return np.ascontiguousarray(image)


def _stage_time(entry: Mapping[str, Any]) -> StageTime:
    stats = entry.get("inference_stats", {})

    def total_ms(key: str) -> float:
        return int(stats.get(key, {}).get("ns", 0)) / 1e6

    return StageTime(
        model=entry["name"],
        executions=int(entry.get("execution_count", 0)),
        inferences=int(entry.get("inference_count", 0)),
        queue_ms=total_ms("queue"),
        compute_ms=sum(map(total_ms, ("compute_input", "compute_infer", "compute_output"))),
    )
