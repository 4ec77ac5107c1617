"""From a PyTorch module to model.onnx: export, cleaning, and comparison on shapes not traced."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from panotriton.errors import ExportError
from panotriton.pipeline.scratch import Scratch
from panotriton.server.engines import CPU, Engine, stand_in
from panotriton_export.gpu_operators import portable, rewrite_for_gpu

__all__ = [
    "LEAST_PICTURE_DB",
    "LIMITS",
    "MAX_BATCH",
    "WEIGHTS",
    "Component",
    "ParityResult",
    "Probe",
    "compare",
    "export_component",
    "save",
    "to_onnx",
]

OPSET = 18
MAX_BATCH = 64  # only bounds what the exporter must prove; the repository's configs batch less
LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-2}
"""Largest difference from PyTorch in fp32 that is let through, relative to the largest value."""

WEIGHTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.float32}
"""What a graph's weights are; for bf16 the engine rounds, as it computes."""

LEAST_PICTURE_DB = 45.0
"""What a picture that was computed in half precision must keep of the one in fp32."""

# Protobuf files end at 2 GB: larger weights go to a file beside the graph.
EXTERNAL_ABOVE_BYTES = 1_900_000_000
_EXTERNAL_NAME = "model.onnx.data"

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Probe:
    """Inputs of another shape than the traced ones, and PyTorch's outputs for them."""

    inputs: Tensors
    expected: Tensors


@dataclass(frozen=True, slots=True)
class Component:
    """One network as the repository serves it.

    traced: example inputs by name; dynamic: for each input its axes whose size is free;
    limits: for each compared output the largest relative difference that is let through. pictures: inputs
    whose IMAGE, as a whole, must be 45 dB from PyTorch's or more, and every other output finite.
    """

    name: str
    module: nn.Module
    traced: Tensors
    dynamic: Mapping[str, Mapping[int, Any]]
    outputs: Sequence[str]
    probes: Sequence[Probe]
    limits: Mapping[str, float]
    pictures: Sequence[Probe] = ()


@dataclass(frozen=True, slots=True)
class ParityResult:
    """Largest difference between a graph's output and PyTorch's, relative to the largest value."""

    component: str
    shape: tuple[int, ...]
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        verdict = "ok" if self.passed else "FAILED"
        return (
            f"{self.component:<22} {shape:<18} {self.difference:8.1e}  {self.limit:7.1e}  {verdict}"
        )


def export_component(
    component: Component, repository: Path, engine: Engine = CPU, precision: str = "fp32"
) -> list[ParityResult]:
    """Write `repository`/NAME/1/model.onnx once its outputs agree with PyTorch's.

    engine, precision: what will serve it and so computes them here; onnxruntime on the CPU stands in
    for GPUs. Raises ExportError, and leaves what was there, where they do not agree.
    """
    version = repository / component.name / "1"
    version.mkdir(parents=True, exist_ok=True)
    model = to_onnx(component)
    has_gpu_operators = portable(model)
    with Scratch(".exporting-", version) as folder:
        path = folder / "model.onnx"
        save(model, path)
        del model
        here = stand_in(engine)
        graph = here.open(path, engine.settings(precision, emulate=True))
        results = compare(component, graph, here.slack)
        del graph
        if has_gpu_operators and here is not engine:
            rewrite_for_gpu(path)
        _publish(path.parent, version)
    return results


def to_onnx(component: Component) -> ir.Model:
    shapes = {name: dict(axes) for name, axes in component.dynamic.items()}
    # Captured by hand: torch.onnx.export alone would retry in other ways, slowly, where this fails.
    with warnings.catch_warnings(), torch.no_grad():
        # Two inputs share the batch axis, which the exporter finds worth a warning.
        warnings.filterwarnings("ignore", ".*axis name: .* will not be used", UserWarning)
        captured = torch.export.export(
            component.module.eval(), tuple(component.traced.values()), dynamic_shapes=shapes
        )
        program = torch.onnx.export(
            captured,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(component.traced),
            output_names=list(component.outputs),
            dynamic_shapes=shapes,  # for their names alone
            verbose=False,
        )
    if program is None:
        raise ExportError(f"{component.name}: torch.onnx.export returned no program")
    _strip(program.model)
    return program.model


def _strip(model: ir.Model) -> None:
    """Remove what differs from machine to machine: stack traces and source paths."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            values += node.outputs
        for value in values:
            value.metadata_props.clear()
            value.doc_string = None


def save(model: ir.Model, path: Path) -> None:
    weights = (value.const_value for value in model.graph.initializers.values())
    large = sum(weight.nbytes for weight in weights if weight is not None) > EXTERNAL_ABOVE_BYTES
    ir.save(model, path, external_data=_EXTERNAL_NAME if large else None)


def _publish(folder: Path, version: Path) -> None:
    """Move the files into place, the graph last; drop weights that only an older graph named."""
    data = folder / _EXTERNAL_NAME
    if data.is_file():
        data.replace(version / _EXTERNAL_NAME)
    else:
        (version / _EXTERNAL_NAME).unlink(missing_ok=True)
    (folder / "model.onnx").replace(version / "model.onnx")


class Runs(Protocol):
    """What of an opened graph a comparison needs."""

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The named outputs."""


def compare(component: Component, graph: Runs, slack: float = 1) -> list[ParityResult]:
    """Run it on every probe; limits are `slack` times the component's.

    Raises ExportError where an output is too far off.
    """
    results = []
    for probe in component.probes:
        feeds = {name: tensor.numpy() for name, tensor in probe.inputs.items()}
        for name, got in zip(probe.expected, graph.run(list(probe.expected), feeds), strict=True):
            difference = relative_difference(got, probe.expected[name].numpy())
            results.append(
                ParityResult(component.name, got.shape, difference, slack * component.limits[name])
            )
    results += [_compare_picture(component, graph, each) for each in component.pictures]
    raise_on_failure(results)
    return results


def _compare_picture(component: Component, graph: Runs, picture: Probe) -> ParityResult:
    """The root of the mean square of the difference, of 255; infinite where an output is not finite."""
    feeds = {name: tensor.numpy() for name, tensor in picture.inputs.items()}
    found = dict(zip(picture.expected, graph.run(list(picture.expected), feeds), strict=True))
    image = found["IMAGE"].astype(np.float64)
    difference = float(np.sqrt(np.mean((image - picture.expected["IMAGE"].numpy()) ** 2)) / 255)
    if not all(np.isfinite(each).all() for each in found.values()):
        difference = float("inf")
    limit = 10 ** (-LEAST_PICTURE_DB / 20)
    return ParityResult(f"{component.name} rms", image.shape, difference, limit)


def relative_difference(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """max |got − expected| / max |expected| (of bytes: / 255); infinite where a value is not finite."""
    if got.shape != expected.shape:
        raise ExportError(f"the graph returns {got.shape}; PyTorch returns {expected.shape}")
    largest = 255 if expected.dtype == np.uint8 else np.abs(expected).max()
    difference = np.abs(got.astype(np.float64) - expected).max() / largest
    return float(difference) if np.isfinite(difference) else float("inf")


def raise_on_failure(results: Sequence[ParityResult]) -> None:
    failed = [str(result) for result in results if not result.passed]
    if failed:
        raise ExportError(
            "exported graphs differ from PyTorch (component, shape, difference, limit):\n"
            + "\n".join(failed)
        )
