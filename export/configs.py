"""Fit a hand-written config.pbtxt to its graph and to what runs it, leaving the rest of the file alone."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from panotriton.errors import ExportError

__all__ = ["PROVIDERS", "fit_config", "keep_plain_layout", "set_provider"]

PROVIDERS = ("cpu", "cuda", "tensorrt")

# Engines are built on the first run of a shape, for minutes: they are kept.
_TENSORRT = """
optimization { execution_accelerators { gpu_execution_accelerator [ {
  name: "tensorrt"
  parameters { key: "precision_mode" value: "%s" }
  parameters { key: "trt_engine_cache_enable" value: "1" }
  parameters { key: "trt_engine_cache_path" value: "/tmp/panotriton-engines" }
} ] } }
"""


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


def keep_plain_layout(model: Path) -> None:
    """Have onnxruntime leave out the layout that pads channels to a vector's 16 lanes.

    It is quick for wide networks; one of 4 to 8 channels then computes mostly padding.
    """
    config = model / "config.pbtxt"
    config.write_text(config.read_text() + "\noptimization { graph { level: 1 } }\n")


def set_provider(model: Path, provider: str, precision: str) -> None:
    """Have `model`'s instances run on the CPU or a GPU, there through CUDA or TensorRT."""
    config = model / "config.pbtxt"
    text = re.sub(r"\noptimization \{.*\} \] \} \}\n", "", config.read_text(), flags=re.DOTALL)
    kind = "KIND_CPU" if provider == "cpu" else "KIND_GPU"
    text = re.sub(r"kind: KIND_(CPU|GPU)", f"kind: {kind}", text)
    if provider == "tensorrt":
        text += _TENSORRT % precision.upper()
    config.write_text(text)
