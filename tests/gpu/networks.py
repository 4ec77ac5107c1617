"""Each network alone, at every shape that its config expects: ms, by one candidate.

    python tests/gpu/networks.py --repository R --candidate shipped

Inputs come from NumPy and results go there, as in the server. Candidates differ in what opens the graph; of
`as exported` and TensorRT the graphs do too: --plain names a repository whose group norms were exported in
pieces. A candidate whose library is not here says so under not_run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import record
from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc.model_config_pb2 import ModelConfig

from panotriton.models.imports import uncollected
from panotriton.pipeline.networks import OSEDIFF
from panotriton.server.engines import TENSORRT, Settings
from panotriton.server.engines.onnxruntime import ShapedSessions
from panotriton.server.engines.shapes import Shapes

# Name → options of onnxruntime's provider, and parameters, over those of the config.
CANDIDATES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "shipped": ({}, {}),
    "exhaustive search": ({"cudnn_conv_algo_search": "EXHAUSTIVE"}, {}),
    "CUDA graphs": ({}, {"cuda_graphs": "1"}),
    "NCHW": ({"prefer_nhwc": "0"}, {}),
    "as exported": ({"prefer_nhwc": "0"}, {}),
    "TensorRT": ({}, {}),
}
PLAIN = ("as exported", "TensorRT")  # which knows no fused operators
TORCH = ("torch eager", "torch compiled", "AOTInductor")
MODELS = OSEDIFF.required


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--candidate", choices=[*CANDIDATES, *TORCH], default="shipped")
    parser.add_argument("--plain", type=Path, help=f"of {', '.join(PLAIN)} (the repository itself)")


def opened(model: Path, candidate: str) -> ShapedSessions:
    """The model's graph by its config and the candidate."""
    text = (model / "config.pbtxt").read_text()
    config = MessageToDict(text_format.Parse(text, ModelConfig()), preserving_proto_field_name=True)
    given, parameters = CANDIDATES[candidate]
    engine, settings = record.engine(), Settings.of(config)
    accelerators = dict(settings.accelerators)
    if candidate == "TensorRT":
        shapes = settings.shapes
        engine, given = TENSORRT, dict(TENSORRT.precisions["fp16"].accelerator or {})
        given |= _profile(shapes.expected if shapes else ())
        given["trt_engine_cache_path"] = tempfile.gettempdir()
    accelerators[engine.accelerator] = {**accelerators.get(engine.accelerator, {}), **given}
    settings = replace(
        settings, accelerators=accelerators, parameters={**settings.parameters, **parameters}
    )
    graph = engine.open(model / "1" / "model.onnx", settings)
    if not isinstance(graph, ShapedSessions):
        raise TypeError(f"{model} fixes no shapes; export it with --provider cuda")
    return graph


def _profile(expected: Sequence[Shapes]) -> dict[str, str]:
    """TensorRT's, by the function that writes the config."""
    entries = TENSORRT.shape_entries
    return dict(entries(expected).accelerator or {}) if entries and expected else {}


def without_tensorrt() -> str:
    """Why it cannot be tried here; "" where it can."""
    import onnxruntime  # noqa: PLC0415, of this candidate alone

    if "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        return f"the installed onnxruntime {onnxruntime.__version__} has no TensorRT"
    try:
        import tensorrt  # noqa: F401, PLC0415
    except ImportError as error:
        return f"{error}: pip install tensorrt"
    return ""


def drawn(zeros: Mapping[str, Any]) -> dict[str, Any]:
    """Random values in the shapes and types of `zeros`."""
    random = np.random.default_rng(0)
    return {
        name: random.integers(0, 256, each.shape).astype(each.dtype)
        if each.dtype.kind in "iu"
        else random.normal(size=each.shape).astype(each.dtype)
        for name, each in zeros.items()
    }


def label(model: str, feeds: Mapping[str, Any]) -> str:
    """osediff_unet 8x4x96x96."""
    return f"{model} {'x'.join(map(str, next(iter(feeds.values())).shape))}"


def by_onnxruntime(repository: Path, candidate: str, found: record.Record, quick: bool) -> None:
    for model in MODELS:
        try:
            graph = opened(repository / model, candidate)
        except Exception as error:  # whatever a library of this machine raises
            found[model] = {"error": " ".join(str(error).split())[:400]}
            continue
        (output, *_) = [each.name for each in graph.get_outputs()]
        for zeros in graph.zeros():
            feeds = drawn(zeros)
            work = partial(measure, graph, output, feeds, quick)
            found.attempt(label(model, feeds), work)


def measure(graph: ShapedSessions, output: str, feeds: dict[str, Any], quick: bool) -> Any:
    result = record.timed(lambda: graph.run([output], feeds), runs=1 if quick else 30)
    (values,) = graph.run([output], feeds)
    return {**result, "finite": bool(np.isfinite(values).all())}


def by_torch(candidate: str, found: record.Record, quick: bool) -> None:
    """diffusers' networks with random weights, half precision on a GPU, of full size or tiny."""
    with uncollected():
        import torch  # noqa: PLC0415, of this candidate alone
        from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: PLC0415

    from panotriton_export.osediff.random_sd import UNET, VAE, vae_blocks  # noqa: PLC0415

    size = "tiny" if quick else "sd21"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.float16 if device == "cuda" else torch.float32
    with torch.device(device):
        unet = UNet2DConditionModel(**UNET[size], use_linear_projection=True).to(kind).eval()
        vae = AutoencoderKL(**vae_blocks(VAE[size])).to(kind).eval()
    width = unet.config.cross_attention_dim

    def tensor(*shape: int) -> Any:
        return torch.randn(shape, device=device, dtype=kind)

    def denoise(batch: int, tile: int) -> Callable[[], Any]:
        fed = (
            tensor(batch, 4, tile, tile),
            torch.tensor([999], device=device),
            tensor(batch, 77, width),
        )
        network = ready(unet, fed)
        return lambda: network(*fed)

    def half(network: Any, *shape: int) -> Callable[[], Any]:
        fed = (tensor(*shape),)
        opened = ready(network, fed)
        return lambda: opened(*fed)

    def compiled(network: Any) -> Any:
        if candidate == "torch eager":
            return network
        torch._dynamo.reset()
        if device == "cpu":
            return torch.compile(network, backend="eager")
        return torch.compile(network, mode="reduce-overhead")

    def packaged(network: Any, fed: tuple[Any, ...]) -> Any:
        """Of these very shapes, by its own graph and, on a GPU, kernels that are compiled beforehand."""
        with torch.no_grad():
            program = torch.export.export(network, fed)
        if device == "cpu":
            return program.module()
        path = torch._inductor.aoti_compile_and_package(program)
        return torch._inductor.aoti_load_package(path)

    def ready(network: Any, fed: tuple[Any, ...]) -> Any:
        return packaged(network, fed) if candidate == "AOTInductor" else compiled(network)

    def waited(make: Callable[[], Callable[[], Any]]) -> Any:
        run = make()

        def once() -> None:
            with torch.inference_mode():
                run()
            if device == "cuda":
                torch.cuda.synchronize()

        return record.timed(once, runs=1 if quick else 20)

    scale = 32 if quick else 1
    sides = (1024 // scale, 2048 // scale)
    jobs = {
        "osediff_unet 1x4x64x64": lambda: denoise(1, 8 if quick else 64),
        "osediff_unet 8x4x96x96": lambda: denoise(2 if quick else 8, 8 if quick else 96),
        "osediff_vae_encoder 1x1024x2048x3": lambda: half(vae.encoder, 1, 3, *sides),
        "osediff_vae_decoder 1x4x128x256": lambda: half(
            vae.decoder, 1, 4, sides[0] // 8, sides[1] // 8
        ),
    }
    if quick:
        del jobs["osediff_unet 8x4x96x96"]  # the same, larger
        del jobs["osediff_vae_encoder 1x1024x2048x3"]  # as the decoder
    for name, make in jobs.items():
        found.attempt(name, lambda make=make: waited(make))


def main() -> None:
    """Measure one candidate."""
    chosen = record.options(__doc__, arguments)
    found = record.Record(chosen.json)
    if chosen.candidate in TORCH:
        by_torch(chosen.candidate, found, chosen.quick)
        return
    if chosen.candidate == "TensorRT" and (why := without_tensorrt()):
        found["not_run"] = why
        return
    plain = chosen.candidate in PLAIN and chosen.plain
    by_onnxruntime(plain or chosen.repository, chosen.candidate, found, chosen.quick)


if __name__ == "__main__":
    record.script.run(main)
