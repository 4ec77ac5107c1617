"""Make the dims of a model's config.pbtxt those of its graph, leaving the rest of the file alone."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from panotriton.errors import ExportError

__all__ = ["fit_config"]


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
