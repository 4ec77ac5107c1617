"""Graphs run by OpenVINO, on Intel's and AMD's CPUs."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panotriton.server.engines.engine import ConfigEntries, Engine, Settings
from panotriton.server.engines.per_shape import PerShape

__all__ = ["OPENVINO", "OpenVINOGraph", "has_bf16"]

Arrays = Mapping[str, NDArray[Any]]
_Key = tuple[tuple[str, ...], tuple[tuple[str, tuple[int, ...]], ...]]  # outputs, inputs' shapes

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
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVINOGraph:
    """One graph, for one thread.

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
        self._model = _core().read_model(str(path))
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
        self._fixed = shapes > 0
        self._compiled = PerShape(self._compile, shapes or _SHAPES)

    def run(self, outputs: Sequence[str], feeds: Arrays) -> list[NDArray[Any]]:
        """The named outputs, as arrays of their own."""
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        shapes = ((name, array.shape) for name, array in arrays.items()) if self._fixed else ()
        request = self._compiled[tuple(outputs), tuple(sorted(shapes))]
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

    def _compile(self, key: _Key) -> Any:
        """An infer request for these outputs and, where there are any, shapes."""
        outputs, shapes = key
        whole = self._model.clone()
        results = [whole.output(name).get_node() for name in outputs]
        model = _openvino().Model(results, whole.get_parameters())
        if shapes:
            model.reshape(dict(shapes))
        return _core().compile_model(model, "CPU", self._settings).create_infer_request()


def _core() -> Any:
    return _core_of(_openvino())


@functools.cache
def _core_of(openvino: Any) -> Any:
    """One for the whole process, never let go. The last one that goes takes away the stack for signal
    handlers that it gave to the thread which had made it: where another thread drops it, that thread's
    next signal, a Ctrl-C, would end the process by SIGSEGV.
    """
    return openvino.Core()


def _openvino() -> Any:
    import openvino  # noqa: PLC0415, of this engine alone

    return openvino


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
    ops = _openvino().opset13
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


def _open(path: Path, settings: Settings) -> OpenVINOGraph:
    precision = settings.choice(_PRECISION, {each: each for each in OPENVINO.precisions}, "fp32")
    if precision == "bf16" and not (settings.emulate or has_bf16()):
        settings.report("fp32, since this CPU has no bfloat16")
        precision = "fp32"
    return OpenVINOGraph(path, threads=settings.threads, precision=precision)


_PRECISION = (
    "openvino_precision"  # of the pip-installed server's backend alone; NVIDIA's computes fp32
)

OPENVINO = Engine(
    name="openvino",
    about="OpenVINO on the CPU",
    wheel="openvino",
    precisions={
        "fp32": ConfigEntries(accelerator={}),
        "bf16": ConfigEntries(accelerator={}, parameters={_PRECISION: "bf16"}),
    },
    opener=_open,
    best=lambda: "bf16" if has_bf16() else "fp32",
    accelerator="openvino",
    operators=frozenset({"MultiHeadAttention"}),
    slack=3,  # 1.4e-4 in fp32 for Stable Diffusion's UNet with random weights
    images_only=True,  # the text encoder, run once a prompt, is not worth another engine's rounding
    # One image fills a core's caches: a batch of them computes no quicker, a tenth slower where they are
    # large, and narrow networks would be compiled for every size of batch.
    batches={"osediff_vae_encoder": 1, "osediff_unet": 1, "osediff_vae_decoder": 1},
)
