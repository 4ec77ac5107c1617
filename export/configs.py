"""Fit a hand-written config.pbtxt to its graph and to what runs it, leaving the rest of the file alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from panotriton.errors import ExportError, quoted
from panotriton.models.one_step import TILES_A_REQUEST
from panotriton.pipeline.files import WEIGHTS
from panotriton.server.engines import ENGINES, ConfigEntries, Engine
from panotriton.server.engines.memory import FRACTION
from panotriton.server.engines.shapes import BATCHES, EXPECTED

__all__ = [
    "find_engine",
    "fit_config",
    "name_weights",
    "read_config",
    "set_engine",
    "set_gpus",
    "set_instances",
    "tiles_a_request",
]

_GPU_INSTANCES = re.compile(r"kind: KIND_(?:GPU|AUTO)( count: \d+)(?: gpus: \[[^\]]*\])?")

Rows = Sequence[Mapping[str, tuple[int, ...]]]  # shapes of inputs, without the batch


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


def set_gpus(model: Path, gpus: Sequence[int]) -> None:
    """Have `model` run on these GPUs, by as many instances on each as its config says.

    Without, Triton runs it on every GPU that it sees. Each instance is a process with weights and sessions
    of its own. Raises ExportError for a model that is not for a GPU.
    """
    config = model / "config.pbtxt"
    text, count = _GPU_INSTANCES.subn(
        rf"kind: KIND_GPU\1 gpus: [ {', '.join(map(str, gpus))} ]", config.read_text()
    )
    if not count:
        raise ExportError(f"{config} has no instances on a GPU, of which one could be chosen")
    config.write_text(text)


def read_config(model: Path) -> ModelConfig:
    """`model`/config.pbtxt."""
    return text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())


def tiles_a_request(denoiser: ModelConfig) -> int:
    """How many tiles an image sends at once: on a GPU as many as fill the largest batch, without a wait.

    Elsewhere no more than four, which those of other images may join.
    """
    most = int(denoiser.max_batch_size)
    on_gpu = any(group.kind == ModelInstanceGroup.KIND_GPU for group in denoiser.instance_group)
    return most if on_gpu or BATCHES in denoiser.parameters else min(TILES_A_REQUEST, most)


def set_engine(model: Path, engine: Engine, precision: str, expected: Rows = ()) -> None:
    """Have `model` run by this engine, and by no other that it was fitted to before.

    expected: for engines that want to know, what requests will be shaped like; of the inputs those whose
    size is free.
    """
    config = model / "config.pbtxt"
    text = _added().sub("", config.read_text())
    text = re.sub(r"kind: KIND_(CPU|GPU)", f"kind: {engine.kind}", text)
    text = re.sub(rf'backend: "({"|".join(_backends())})"', f'backend: "{engine.backend}"', text)
    if batch := engine.largest_batch(model.name):
        text = re.sub(r"max_batch_size: \d+", f"max_batch_size: {batch}", text)
    if (
        engine.fixed_batches
    ):  # requests gather while the network is busy; while it is not, none has to wait
        text = re.sub(r"max_queue_delay_microseconds: \d+", "max_queue_delay_microseconds: 0", text)
    config.write_text(text)
    entries = _merged(engine.precisions[precision], _shape_entries(model, engine, expected))
    if share := engine.memory_fractions.get(model.name):
        entries = _merged(entries, ConfigEntries(parameters={FRACTION: f"{share:g}"}))
    config.write_text(text + _text(engine, entries))


def name_weights(model: Path, *contents: bytes | Path) -> None:
    """Have `model`'s config say what it was exported from: a checksum, which any client can ask for.

    contents: all that its answers depend on. Where the folder has no config yet, nothing is said.
    """
    config = model / "config.pbtxt"
    if not config.is_file():
        return
    total = hashlib.sha256()
    for content in contents:
        if isinstance(content, bytes):
            total.update(content)
            continue
        with content.open("rb") as file:
            while block := file.read(1 << 24):
                total.update(block)
    kept = re.sub(rf'\nparameters \{{ key: "{WEIGHTS}".*\n', "", config.read_text())
    value = f"sha256:{total.hexdigest()}"
    config.write_text(
        f'{kept}\nparameters {{ key: "{WEIGHTS}" value {{ string_value: "{value}" }} }}\n'
    )


def _shape_entries(model: Path, engine: Engine, expected: Rows) -> ConfigEntries:
    """What a config says of batch sizes and shapes."""
    sizes = engine.fixed_batches.get(model.name, ())
    named = {BATCHES: ",".join(map(str, sizes))} if sizes else {}
    if engine.shape_entries is None or not (expected or sizes):
        return ConfigEntries(parameters=named)
    config = read_config(model)
    fixed = {each.name: tuple(each.dims) for each in config.input}
    rows = [fixed | dict(each) for each in expected or [{}]]
    rows = [each for each in rows if -1 not in (side for shape in each.values() for side in shape)]
    if not rows:
        return ConfigEntries(parameters=named)
    shapes = [
        {name: (batch, *shape) for name, shape in each.items()}
        for each in rows
        for batch in sizes or sorted({1, config.max_batch_size})
    ]
    entries = engine.shape_entries(shapes)
    return ConfigEntries(entries.accelerator, {**named, **entries.parameters})


def _merged(first: ConfigEntries, second: ConfigEntries) -> ConfigEntries:
    accelerators = [each.accelerator for each in (first, second) if each.accelerator is not None]
    return ConfigEntries(
        {key: value for each in accelerators for key, value in each.items()}
        if accelerators
        else None,
        {**first.parameters, **second.parameters},
    )


def _text(engine: Engine, entries: ConfigEntries) -> str:
    """What a config.pbtxt says of the engine."""
    text = ""
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


def _backends() -> list[str]:
    return sorted({re.escape(engine.backend) for engine in ENGINES.values()})


def _added() -> re.Pattern[str]:
    """What `_text` writes of any engine."""
    every = (entries for engine in ENGINES.values() for entries in engine.precisions.values())
    keys = {key for entries in every for key in entries.parameters} | {BATCHES, EXPECTED, FRACTION}
    accelerator = r"optimization \{.*?\} \] \} \}"
    parameter = rf'parameters \{{ key: "(?:{"|".join(map(re.escape, sorted(keys)))})".*?'
    return re.compile(rf"\n(?:{accelerator}|{parameter})\n", re.DOTALL)
