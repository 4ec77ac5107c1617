"""What it costs that a network is on another server: one call, and a whole group.

A call: from a Python model to a network that only answers, with the tensors of full size, to the same server
and by gRPC to another one on loopback. A group: the small preset on one server, and with UNet, VAE decoder
and Qwen-VL on a second one. Both share this machine's cores, so the group's figure is of the hops alone: what
more machines gain is not in it.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import script

from panotriton import Client, Group
from panotriton.server.launch import LocalServer

ELSEWHERE = ("osediff_unet", "osediff_vae_decoder", "qwen")
# Than usual: two servers and a half share this machine.
SMALLER = {"crop_size": 256, "interpolations": 3}
# What a network gets and gives, without the work.
NETWORK = """
import triton_python_backend_utils as pb_utils
import numpy as np

class TritonPythonModel:
    def initialize(self, args):
        self._shape, self._dtype, self._name = {shape}, np.{dtype}, "{output}"

    def execute(self, requests):
        made = np.zeros(self._shape, self._dtype)
        return [pb_utils.InferenceResponse([pb_utils.Tensor(self._name, made)]) for _ in requests]
"""
CALLER = """
import time
import numpy as np
from panotriton.models.requests import call, required, respond_async

CALLS = {calls}

class TritonPythonModel:
    async def execute(self, requests):
        return await respond_async(requests, self._measure)

    async def _measure(self, request):
        index, runs = required(request, "WHAT")
        model, inputs, output = CALLS[index]
        tensors = {{name: np.ones(shape, dtype) for name, (shape, dtype) in inputs.items()}}
        seconds = []
        for _ in range(runs):
            began = time.perf_counter()
            await call(model, tensors, [output])
            seconds.append(time.perf_counter() - began)
        return {{"SECONDS": np.array(seconds)}}
"""
CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 0
input [ {inputs} ]
output [ {outputs} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""
# What is sent, to which network, with which inputs, and what comes back: shapes of full-size weights.
CALLS: dict[
    str, tuple[str, dict[str, tuple[tuple[int, ...], str]], str, tuple[tuple[int, ...], str]]
] = {
    "UNet, 1 tile of 96×96 latents": (
        "osediff_unet",
        {"LATENT": ((1, 4, 96, 96), "float32"), "PROMPT_EMBEDS": ((1, 77, 1024), "float32")},
        "NOISE",
        ((1, 4, 96, 96), "float32"),
    ),
    "VAE decoder, a pair of 2048×1024 px": (
        "osediff_vae_decoder",
        {"LATENT": ((1, 4, 128, 256), "float32")},
        "IMAGE",
        ((1, 1024, 2048, 3), "uint8"),
    ),
    "Qwen-VL, a pair of 2048×1024 px": (
        "qwen",
        {"IMAGE": ((1, 1024, 2048, 3), "uint8")},
        "VALUE",
        ((1, 1), "float32"),
    ),
}
TYPES = {
    "float32": "TYPE_FP32",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "float64": "TYPE_FP64",
}


def entries(tensors: dict[str, tuple[tuple[int, ...], str]]) -> str:
    return ", ".join(
        f'{{ name: "{name}" data_type: {TYPES[dtype]} dims: [ {", ".join(["-1"] * len(shape))} ] }}'
        for name, (shape, dtype) in tensors.items()
    )


def write(folder: Path, code: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    (folder / "1").mkdir(parents=True)
    config = CONFIG.format(name=folder.name, inputs=entries(inputs), outputs=entries(outputs))
    (folder / "config.pbtxt").write_text(config)
    (folder / "1" / "model.py").write_text(code)


def repository(folder: Path) -> Path:
    """The caller, and the networks that it calls."""
    for model, inputs, output, (shape, dtype) in CALLS.values():
        code = NETWORK.format(shape=shape, dtype=dtype, output=output)
        write(folder / model, code, inputs, {output: (shape, dtype)})
    calls = [(model, inputs, output) for model, inputs, output, _ in CALLS.values()]
    what, seconds = {"WHAT": ((2,), "int32")}, {"SECONDS": ((1,), "float64")}
    write(folder / "caller", CALLER.format(calls=repr(calls)), what, seconds)
    return folder


def megabytes(index: int) -> float:
    _, inputs, _, result = list(CALLS.values())[index]
    sizes = (
        np.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in (*inputs.values(), result)
    )
    return float(sum(sizes)) / 1e6


def calls(folder: Path, runs: int) -> list[dict[str, Any]]:
    """Milliseconds a call, to the same server and to another."""
    made = repository(folder)
    with LocalServer(made) as one:
        place = f"{','.join(ELSEWHERE)}={one.grpc_url}"
        with (
            LocalServer(made, placement=place) as other,
            Client(one.grpc_url) as here,
            Client(other.grpc_url) as there,
        ):
            return [
                {"what": what, "mb": megabytes(index)}
                | in_turns({"here": here, "there": there}, index, runs)
                for index, what in enumerate(CALLS)
            ]


def in_turns(clients: dict[str, Client], index: int, runs: int) -> dict[str, float]:
    took: dict[str, list[float]] = {name: [] for name in clients}
    for turn in range(runs + 1):
        for name, client in clients.items():
            given = {"WHAT": np.array([index, 10], np.int32)}
            seconds = client.infer("caller", given, ["SECONDS"])["SECONDS"]
            took[name] += list(seconds * 1e3) if turn else []  # the first warms up
    return {name: statistics.median(values) for name, values in took.items()}


def groups(repository: Path, folder: Path, runs: int) -> dict[str, list[float]]:
    """Seconds a group, on one server and on two, in turns; the results are compared bit for bit."""
    lacking = folder / "front"
    shutil.copytree(repository, lacking, ignore=lambda _, names: {*ELSEWHERE} & {*names})
    took: dict[str, list[float]] = {"one server": [], "two servers": []}
    with ExitStack() as stack:
        enter = stack.enter_context
        two = enter(LocalServer(repository, load_models=ELSEWHERE))
        place = f"{','.join(ELSEWHERE)}={two.grpc_url}"
        servers = (LocalServer(repository), LocalServer(lacking, placement=place))
        clients = [enter(Client(enter(server).grpc_url)) for server in servers]
        for turn in range(runs + 1):
            made = []
            for name, client in zip(took, clients, strict=True):
                began = time.perf_counter()
                made.append(client.process(*script.GROUP, seed=script.SEED, **SMALLER))
                if turn:  # the first warms up
                    took[name].append(time.perf_counter() - began)
            check_same(*made)
    return took


def check_same(one: Group, other: Group) -> None:
    """End the measurement where a second server changes a bit."""
    for mine, theirs in zip(one.pairs, other.pairs, strict=True):
        if not np.array_equal(mine.sharp, theirs.sharp) or mine.raw != theirs.raw:
            raise SystemExit(f"panorama {mine.panorama}, interval {mine.interval} differs")


def text(hops: list[dict[str, Any]], took: dict[str, list[float]], runs: int) -> str:
    rows = [
        (
            hop["what"],
            f"{hop['mb']:.1f}",
            *(f"{hop[where]:.1f}" for where in ("here", "there")),
            f"{hop['there'] - hop['here']:.1f}",
        )
        for hop in hops
    ]
    head = ("a call to", "MB there and back", "same server, ms", "another, ms", "the hop, ms")
    figures = (statistics.median, min, max)
    seconds = [(name, *(f"{f(values):.1f}" for f in figures)) for name, values in took.items()]
    return (
        f"{script.table(head, rows)}\n\n"
        f"A group of the small preset, crops of 256 px, 3 in-between views, {runs} runs each, in turns, the "
        "same bit for bit:\n\n"
        f"{script.table(('networks on', 'median s', 'least', 'most'), seconds)}"
    )


def main() -> None:
    chosen = script.options(__doc__)
    runs = 1 if chosen.quick else 7
    exported = script.exported(chosen.repository)
    with tempfile.TemporaryDirectory() as name:
        hops = calls(Path(name) / "calls", runs)
        took = groups(exported, Path(name), runs)
    result = {"machine": script.machine(), "hops": hops, "groups_s": took}
    script.finish(chosen, result, text(hops, took, runs))


if __name__ == "__main__":
    script.run(main)
