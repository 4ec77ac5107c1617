"""An exported graph run by OpenVINO, on Intel's and AMD's CPUs.

```python
graph = OpenVINOGraph(Path("repository/osediff_vae_encoder/1/model.onnx"), threads=2)
(latent,) = graph.run(["LATENT"], {"IMAGE": image})
```
Needs pip install 'panotriton[server]'.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

__all__ = ["PRECISIONS", "OpenVINOGraph", "has_bf16"]

PRECISIONS = ("fp32", "bf16")

Arrays = Mapping[str, NDArray[Any]]

# What a diffusion network's blocks multiply by. The layers at its ends carry pixels and latents
# themselves, and so do the shortcuts past a block: 8 bits of mantissa would show there.
_BLOCK_WEIGHT = re.compile(r"_blocks?\.(?!.*conv_shortcut)")
_FOLDED_WEIGHT = re.compile(r"val_\d+")  # a linear layer's, transposed by the exporter
_SHAPES = 8
_SMALL_BYTES = 64_000_000
_MIXED = ("Convolution", "MatMul")
_TYPES = {"f32": "float", "f16": "float16", "f64": "double", "boolean": "bool", "u8": "uint8",
          "u16": "uint16", "u32": "uint32", "u64": "uint64", "i8": "int8", "i16": "int16", "i32": "int32",
          "i64": "int64"}  # fmt: skip


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX512_BF16, AMX); elsewhere fp32 is quicker."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVINOGraph:
    """One graph, with the methods of onnxruntime's InferenceSession that are used here. One thread.

    threads: at most so many compute at once. precision: fp32, or bf16, which has the blocks'
    convolutions and linear layers multiply bfloat16 and add up fp32; what layers hand on stays fp32.
    shapes: so many shapes of the inputs are compiled for and kept, the last used; 0 compiles once, for
    all shapes; None is 8, or 0 where the weights take over 64 MB, since each holds them once more. Fixed
    shapes let OpenVINO fuse what lies between convolutions, most of a narrow network's time. Raises
    RuntimeError for a file that is no graph.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int,
        precision: str = "fp32",
        shapes: int | None = None,
    ) -> None:
        self._core = ov.Core()
        self._model = self._core.read_model(str(path))
        if precision == "bf16":
            _multiply_bf16(self._model)
        self._settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            # The server's other networks would be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        if shapes is None:
            shapes = 0 if _weight_bytes(self._model) > _SMALL_BYTES else _SHAPES
        self._shapes = shapes
        self._compiled: OrderedDict[Any, Any] = OrderedDict()  # key → its infer request

    def run(
        self, outputs: Sequence[str], feeds: Arrays, options: object = None
    ) -> list[NDArray[Any]]:
        """The named outputs, as arrays of their own. options: onnxruntime's, ignored."""
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        request = self._request(tuple(outputs), {name: a.shape for name, a in arrays.items()})
        results = request.infer(arrays, share_inputs=True, share_outputs=True)
        return [results[name].copy() for name in outputs]

    def get_inputs(self) -> list[SimpleNamespace]:
        """name, type and shape of each, as onnxruntime writes them."""
        return [_described(port) for port in self._model.inputs]

    def get_outputs(self) -> list[SimpleNamespace]:
        """name, type and shape of each, as onnxruntime writes them."""
        return [_described(port) for port in self._model.outputs]

    def get_overridable_initializers(self) -> list[SimpleNamespace]:
        """None: OpenVINO takes initializers for constants."""
        return []

    def get_providers(self) -> list[str]:
        """What computes."""
        return ["OpenVINO"]

    def _request(self, outputs: tuple[str, ...], shapes: dict[str, tuple[int, ...]]) -> Any:
        """Compiled for these outputs and shapes; the one longest unused makes room."""
        key = (outputs, *sorted(shapes.items())) if self._shapes else outputs
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key]
        while self._shapes and len(self._compiled) >= self._shapes:
            self._compiled.popitem(last=False)
        whole = self._model.clone()
        results = [whole.output(name).get_node() for name in outputs]
        model = ov.Model(results, whole.get_parameters())
        if self._shapes:
            model.reshape(shapes)
        compiled = self._core.compile_model(model, "CPU", self._settings)
        self._compiled[key] = compiled.create_infer_request()
        return self._compiled[key]


def _described(port: Any) -> SimpleNamespace:
    kind = port.get_element_type().get_type_name()
    shape = [dim.get_length() if dim.is_static else None for dim in port.get_partial_shape()]
    return SimpleNamespace(
        name=port.get_any_name(), type=f"tensor({_TYPES.get(kind, kind)})", shape=shape
    )


def _weight_bytes(model: Any) -> int:
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return sum(node.get_byte_size() for node in constants)


def _multiply_bf16(model: Any) -> None:
    """Round both factors of the blocks' products to bfloat16; the sums stay fp32."""
    for node in model.get_ordered_ops():
        if node.get_type_name() not in _MIXED or not _is_in_a_block(node):
            continue
        for factor in (node.input(0), node.input(1)):
            factor.replace_source_output(ops.convert(factor.get_source_output(), "bf16").output(0))
        users = list(node.output(0).get_target_inputs())
        node.validate_and_infer_types()
        result = ops.convert(node.output(0), "f32").output(0)
        for user in users:
            user.replace_source_output(result)
    model.validate_nodes_and_infer_types()


def _is_in_a_block(node: Any) -> bool:
    weight = node.input_value(1).get_node()
    name = weight.get_friendly_name()
    if weight.get_type_name() != "Constant":
        return False
    return bool(_BLOCK_WEIGHT.search(name) or _FOLDED_WEIGHT.fullmatch(name))
