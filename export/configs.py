"""Fit a hand-written config.pbtxt to its graph and to what runs it, leaving the rest of the file alone."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from panotriton.errors import ExportError, quoted
from panotriton.server.engines import ENGINES, Engine

__all__ = ["find_engine", "fit_config", "set_engine", "set_instances"]


def find_engine(provider: str, precision: str | None = None) -> Engine:
    """The engine of that name; raises ExportError where there is none, or not in that precision."""
    if provider not in ENGINES:
        raise ExportError(f"provider is {quoted(provider)}; expected one of {', '.join(ENGINES)}")
    engine = ENGINES[provider]
    if precision is not None and precision not in engine.precisions:
        expected = " or ".join(engine.precisions)
        raise ExportError(f"precision is {quoted(precision)}; expected {expected} for {provider}")
    return engine


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


def set_engine(model: Path, engine: Engine, precision: str) -> None:
    """Have `model` run by this engine, and by no other that it was fitted to before."""
    config = model / "config.pbtxt"
    text = _added().sub("", config.read_text())
    text = re.sub(r"kind: KIND_(CPU|GPU)", f"kind: {engine.kind}", text)
    if model.name in engine.batches:
        text = re.sub(r"max_batch_size: \d+", f"max_batch_size: {engine.batches[model.name]}", text)
    config.write_text(text + _entries(engine, precision))


def _entries(engine: Engine, precision: str) -> str:
    """What a config.pbtxt says of the engine."""
    entries, text = engine.precisions[precision], ""
    if entries.accelerator is not None:
        lines = [f'name: "{engine.accelerator}"']
        lines += [
            f'parameters {{ key: "{key}" value: "{value}" }}'
            for key, value in entries.accelerator.items()
        ]
        inside = "".join(f"\n  {line}" for line in lines) + "\n" if lines[1:] else f" {lines[0]} "
        text += (
            f"\noptimization {{ execution_accelerators {{ {engine.side} [ {{{inside}}} ] }} }}\n"
        )
    for key, value in entries.parameters.items():
        text += f'\nparameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
    return text


def _added() -> re.Pattern[str]:
    """What `_entries` writes of any engine."""
    every = (entries for engine in ENGINES.values() for entries in engine.precisions.values())
    keys = sorted({re.escape(key) for entries in every for key in entries.parameters})
    accelerator = r"optimization \{.*?\} \] \} \}"
    parameter = rf'parameters \{{ key: "(?:{"|".join(keys)})".*?'
    return re.compile(rf"\n(?:{accelerator}|{parameter})\n", re.DOTALL)
