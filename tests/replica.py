"""A stand-in for one server: the gRPC protocol of tritonserver around groups that are made up in no time.

    python tests/replica.py --port P [--seconds S] [--poison SEED …] [--gate FILE] [--weights W] [--busy N] …

A group depends on its panoramas, seed and options alone, as a real one does, and takes `--seconds` of the one
device that a replica has. A request with a poison seed ends the process, as a crash of a model does. While
the gate file exists, new requests are refused with the words of a server that drains. More than `--busy`
requests at once are refused with the words of a full queue. What it serves it says
after `--late` seconds. After `--turn` groups it is as if it had been started anew with other weights. If it
is asked its name once it has made a group, and the file of `--shy` is not there, its process ends.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from panotriton.pipeline.camera import sample_cameras
from panotriton.pipeline.group import interpolate_cameras

INTERVALS = 8


def made(inputs: dict[str, Any], weights: str) -> dict[str, np.ndarray]:
    """The ensemble's outputs."""
    digest = hashlib.sha256(weights.encode())
    for name in sorted(inputs):
        digest.update(name.encode() + inputs[name])
    rng = np.random.default_rng(int.from_bytes(digest.digest()[:8], "little"))
    size, count = _int(inputs, "CROP_SIZE"), _int(inputs, "NUM_INTERPOLATIONS")
    sharp = size * _int(inputs, "UPSCALE")
    cameras = sample_cameras(int.from_bytes(inputs["SEED"], "little"))
    kept = np.flatnonzero(rng.random(INTERVALS) < 0.4).astype(np.int32) + 1
    score = np.full(2 * INTERVALS, 0.4, np.float32)
    for interval in kept:
        score[[interval - 1, INTERVALS + interval - 1]] = 0.9
    between = interpolate_cameras(cameras, kept, count)  # (K, 2, N, 5)
    views = len(kept) * 2 * count
    texts = [b"A view." for _ in kept]
    return {
        "CAMERAS": cameras,
        "PAIRS": _flat(rng, 2 * INTERVALS, size, 2 * size),
        "PAIRS_SR": _flat(rng, 2 * INTERVALS, sharp, 2 * sharp),
        "SCORE": score,
        "SUB_SCORES": np.full((2 * INTERVALS, 5), 0.5, np.float32),
        "RAW_OUTPUT": np.array([b"Final Score: ?"] * 2 * INTERVALS, np.object_),
        "KEPT": kept,
        "DESCRIPTION": np.array(texts, np.object_),
        "DESCRIPTION_ERROR": np.array([b""] * len(kept), np.object_),
        "INTERPOLATED": _flat(rng, views, size, size),
        "INTERPOLATED_CAMERAS": between,
        "INTERPOLATED_SR": _flat(rng, views, sharp, sharp),
        "WARNING": np.array([b""], np.object_),
    }


def _flat(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Images of one colour each: small as JPEG, and told apart."""
    colours = rng.integers(0, 256, (count, 1, 1, 3), np.uint8)
    return np.broadcast_to(colours, (count, height, width, 3))


def _int(inputs: dict[str, bytes], name: str) -> int:
    return int.from_bytes(inputs[name], "little")


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._device = threading.Lock()
        self._inside = 0
        self._count = 0

    def ServerLive(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=not self._gated())

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        if self._count and self._options.shy and not self._options.shy.exists():
            self._options.shy.touch()
            os._exit(9)
        return service_pb2.ServerMetadataResponse(name="stand-in", version="1")

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=True)

    def ModelConfig(self, request: Any, context: Any) -> Any:
        time.sleep(self._options.late)
        response = service_pb2.ModelConfigResponse()
        if weights := self._weights():
            response.config.parameters["weights"].string_value = weights
        return response

    def _weights(self) -> str:
        turned = self._options.turn is not None and self._count >= self._options.turn
        return "sha256:turned" if turned else str(self._options.weights)

    def ModelStatistics(self, request: Any, context: Any) -> Any:
        response = service_pb2.ModelStatisticsResponse()
        model = response.model_stats.add(name="osediff_unet", version="1")
        batch = model.batch_stats.add(batch_size=1)
        batch.compute_infer.count = self._count
        batch.compute_infer.ns = int(self._count * self._options.seconds * 1e9)
        return response

    def ModelInfer(self, request: Any, context: Any) -> Any:
        inputs = dict(
            zip((i.name for i in request.inputs), request.raw_input_contents, strict=True)
        )
        if self._gated():
            context.abort(grpc.StatusCode.UNAVAILABLE, "Server is stopping, scheduler will end")
        if self._inside >= self._options.busy:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
        self._inside += 1
        try:
            if _int(inputs, "SEED") in self._options.poison:
                os._exit(9)
            with self._device:
                time.sleep(self._options.seconds)
                weights = self._weights()
                self._count += 1
        finally:
            self._inside -= 1
        return _response(request, made(inputs, weights))

    def _gated(self) -> bool:
        return bool(self._options.gate) and self._options.gate.exists()


def _response(request: Any, tensors: dict[str, np.ndarray]) -> Any:
    response = service_pb2.ModelInferResponse(model_name=request.model_name)
    for wanted in request.outputs:
        array = tensors[wanted.name]
        text = array.dtype == np.object_
        kind = "BYTES" if text else np_to_triton_dtype(array.dtype)
        response.outputs.add(name=wanted.name, datatype=kind, shape=array.shape)
        packed = serialize_byte_tensor(array) if text else array
        raw = packed.item() if text and packed.size else packed.tobytes()
        response.raw_output_contents.append(raw)
    return response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--poison", type=int, nargs="*", default=[])
    parser.add_argument("--gate", type=Path)
    parser.add_argument("--weights", default="sha256:stand-in")
    parser.add_argument("--turn", type=int)
    parser.add_argument("--shy", type=Path)
    parser.add_argument("--late", type=float, default=0.0)
    parser.add_argument("--busy", type=int, default=64)
    options = parser.parse_args()
    server = grpc.server(
        futures.ThreadPoolExecutor(32), options=[("grpc.max_receive_message_length", -1)]
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Server(options), server)
    server.add_insecure_port(f"127.0.0.1:{options.port}")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


class Replica:
    """One as a process; started again on the same port by `restart`."""

    def __init__(self, port: int, *arguments: object) -> None:
        self.url = f"127.0.0.1:{port}"
        self._command = [sys.executable, __file__, "--port", str(port), *map(str, arguments)]
        self.restart()

    def restart(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


if __name__ == "__main__":
    main()
