"""Fit a hand-written config.pbtxt to its graph and to what runs it, leaving the rest of the file alone."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from panotriton.errors import ExportError

__all__ = ["check_engine", "fit_config", "set_instances", "set_provider"]

_PRECISIONS = {  # of each provider
    "cpu": ("fp32", "fp16"),
    "openvino": ("fp32", "bf16"),
    "cuda": ("fp32", "fp16"),
    "tensorrt": ("fp32", "fp16"),
}
# What `set_provider` has added to a config that is not copied anew.
_ADDED = re.compile(
    r'\n(optimization \{.*?\} \] \} \}|parameters \{ key: "openvino_precision".*?)\n', re.DOTALL
)

# Engines are built on the first run of a shape, for minutes: they are kept.
_TENSORRT = """
optimization { execution_accelerators { gpu_execution_accelerator [ {
  name: "tensorrt"
  parameters { key: "precision_mode" value: "%s" }
  parameters { key: "trt_engine_cache_enable" value: "1" }
  parameters { key: "trt_engine_cache_path" value: "/tmp/panotriton-engines" }
} ] } }
"""

_OPENVINO = """
optimization { execution_accelerators { cpu_execution_accelerator [ { name: "openvino" } ] } }
"""
# Of the pip-installed server's backend alone; NVIDIA's computes fp32.
_OPENVINO_BF16 = """
parameters { key: "openvino_precision" value { string_value: "bf16" } }
"""
# One image fills a core's caches; a batch of them computes no quicker.
_CPU_BATCHES = {"osediff_vae_encoder": 1, "osediff_vae_decoder": 1, "osediff_unet": 4}


def check_engine(provider: str, precision: str) -> None:
    """Raise ExportError for a provider, or a precision, that is not to be had."""
    if provider not in _PRECISIONS:
        raise ExportError(f"provider is {provider!r}; expected one of {', '.join(_PRECISIONS)}")
    if precision not in _PRECISIONS[provider]:
        expected = " or ".join(_PRECISIONS[provider])
        raise ExportError(f"precision is {precision!r}; expected {expected} for {provider}")


def fit_config(model: Path) -> None:
    """Rewrite `dims` in `model`/config.pbtxt from `model`/1/model.onnx.

    Triton wants them equal: channels and embedding widths differ from one base model to another.
    The batch dimension leads in every graph and is left out, as max_batch_size > 0 demands.
    """
    graph = onnx.load(str(model / "1" / "model.onnx"), load_external_data=False).graph
    config = model / "config.pbtxt"
    text = config.read_text()
    for tensor in (*graph.input, *graph.output):
        dims = [d.dim_value or -1 for d in tensor.type.tensor_type.shape.dim][1:]
        pattern = rf'(name: "{tensor.name}" data_type: TYPE_\w+ dims: )\[[^\]]*\]'
        text, count = re.subn(pattern, rf"\1[ {', '.join(map(str, dims))} ]", text)
        if not count and tensor in graph.input:
            raise ExportError(f"{config} does not declare the graph's input {tensor.name}")
    if text != config.read_text():
        config.write_text(text)


def set_instances(model: Path, count: int) -> None:
    """Have `count` instances share the cores, instead of one on all of them.

    For small networks: two on one core each waste less than two threads that wait for each other.
    """
    config = model / "config.pbtxt"
    config.write_text(re.sub(r"count: \d+", f"count: {count}", config.read_text()))


def set_provider(model: Path, provider: str, precision: str) -> None:
    """Have `model` run by onnxruntime or OpenVINO, CUDA or TensorRT."""
    config = model / "config.pbtxt"
    kind = "KIND_CPU" if provider in ("cpu", "openvino") else "KIND_GPU"
    text = _ADDED.sub("", config.read_text())
    text = re.sub(r"kind: KIND_(CPU|GPU)", f"kind: {kind}", text)
    if provider == "tensorrt":
        text += _TENSORRT % precision.upper()
    if provider == "openvino":
        text += _OPENVINO + (_OPENVINO_BF16 if precision == "bf16" else "")
        if model.name in _CPU_BATCHES:
            batch = f"max_batch_size: {_CPU_BATCHES[model.name]}"
            text = re.sub(r"max_batch_size: \d+", batch, text)
    config.write_text(text)
