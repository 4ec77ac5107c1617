"""Graphs run by onnxruntime, on CPUs and on NVIDIA's GPUs, with TensorRT there where asked for.

Which parameters a config.pbtxt may have, and what they mean, is as in Triton's own onnxruntime backend.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from panotriton.errors import EngineError
from panotriton.server.engines.engine import ConfigEntries, Engine, Settings

__all__ = ["CPU", "CUDA", "TENSORRT", "by_providers"]

Provider = tuple[str, Mapping[str, str]]  # onnxruntime's name for what computes, options

_ON_CPU: Provider = ("CPUExecutionProvider", {})
# `optimization { graph { level } }`; any other level means 0, as in the native backend.
_GRAPH_LEVELS = {
    -1: "ORT_ENABLE_BASIC",
    0: "ORT_ENABLE_ALL",
    1: "ORT_ENABLE_EXTENDED",
    2: "ORT_DISABLE_ALL",
}
_EXECUTION_MODES = {"0": "ORT_SEQUENTIAL", "1": "ORT_PARALLEL"}
_SWITCH = {"1": True, "true": True, "0": False, "false": False}
_GPU_WHEEL = "onnxruntime-gpu"
_ATTENTION = frozenset({"MultiHeadAttention"})

_TENSORRT_NAMES = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
_TENSORRT_PRECISIONS: dict[str, dict[str, str]] = {
    "FP32": {},
    "FP16": {"trt_fp16_enable": "True"},
    "BF16": {"trt_bf16_enable": "True"},
    "INT8": {"trt_int8_enable": "True"},
}
# The wheel takes only True and False for these, config.pbtxt also 1 and 0.
_TENSORRT_SWITCH = re.compile("enable|use_native|dump|force|fallback|detailed")
# Engines are built on the first run of a shape, for minutes: they are kept.
_TENSORRT_CACHE = {
    "trt_engine_cache_enable": "1",
    "trt_engine_cache_path": "/tmp/panotriton-engines",  # noqa: S108
}


class Session:
    """An InferenceSession that is always run with the same options."""

    def __init__(self, session: Any, run_options: Any) -> None:
        self._run = partial(session.run, run_options=run_options)
        self.get_inputs = session.get_inputs
        self.get_outputs = session.get_outputs
        self.get_overridable_initializers = session.get_overridable_initializers
        self.get_providers = session.get_providers

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The named outputs, as arrays of their own."""
        results: list[NDArray[Any]] = self._run(outputs, feeds)
        return results


def by_providers(names: Sequence[str]) -> Engine:
    """What onnxruntime has under these names, best first, whatever a config says."""
    return replace(CPU, opener=partial(open_session, providers=[(name, {}) for name in names]))


def open_session(path: Path, settings: Settings, providers: Sequence[Provider]) -> Session:
    """A session with every one of `providers`: by default onnxruntime falls back in silence.

    Raises EngineError for those that the installed wheel lacks or that do not start.
    """
    ort = _onnxruntime()
    for name, _ in providers:
        if name not in ort.get_available_providers():
            raise EngineError(
                f"{name} is not in the installed onnxruntime {ort.__version__}: pip install "
                f"{_GPU_WHEEL} in its place, or use KIND_CPU without execution accelerators"
            )
    options = session_options(settings)
    session = ort.InferenceSession(str(path), options, providers=list(providers), enable_fallback=0)
    for name, _ in providers:
        if name not in session.get_providers():
            reason = "the server's log names the library that is missing"
            raise EngineError(f"{name} did not start; {reason}, or use KIND_CPU")
    return Session(session, run_options(settings))


def session_options(settings: Settings) -> Any:
    """onnxruntime's SessionOptions; raises EngineError for a parameter's value that is unknown."""
    ort = _onnxruntime()
    options = ort.SessionOptions()
    level = _GRAPH_LEVELS.get(settings.graph_level, _GRAPH_LEVELS[0])
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    mode = settings.choice("execution_mode", _EXECUTION_MODES, "0")
    options.execution_mode = getattr(ort.ExecutionMode, mode)
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = settings.inter_op_threads
    options.enable_cpu_mem_arena = settings.choice("enable_mem_arena", _SWITCH, "1")
    options.enable_mem_pattern = settings.choice("enable_mem_pattern", _SWITCH, "1")
    # A thread that spins between runs takes a core from other networks.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    allocator = "session.use_device_allocator_for_initializers"
    options.add_session_config_entry(allocator, settings.parameters.get(allocator, "0"))
    for library in settings.libraries:
        options.register_custom_ops_library(library)
    return options


def run_options(settings: Settings) -> Any:
    """onnxruntime's RunOptions."""
    options = _onnxruntime().RunOptions()
    shrinkage = "memory.enable_memory_arena_shrinkage"
    if settings.parameters.get(shrinkage):
        options.add_run_config_entry(shrinkage, settings.parameters[shrinkage])
    return options


def cuda_providers(settings: Settings) -> list[Provider]:
    """Best first."""
    options = settings.accelerators.get(CUDA.accelerator, {})
    return [("CUDAExecutionProvider", {**options, "device_id": settings.device}), _ON_CPU]


def tensorrt_providers(settings: Settings) -> list[Provider]:
    """Best first: CUDA runs what TensorRT leaves. Raises EngineError for an unknown parameter."""
    options: dict[str, str] = {}
    for key, value in settings.accelerators.get(TENSORRT.accelerator, {}).items():
        name = _TENSORRT_NAMES.get(key, key)
        if key == "precision_mode" and value in _TENSORRT_PRECISIONS:
            options |= _TENSORRT_PRECISIONS[value]
        elif not name.startswith("trt_"):
            raise EngineError(f"unknown tensorrt parameter {key}: '{value}'")
        elif _TENSORRT_SWITCH.search(name):
            options[name] = {"1": "True", "0": "False"}.get(value, value)
        else:
            options[name] = value
    first = ("TensorrtExecutionProvider", {**options, "device_id": settings.device})
    return [first, *cuda_providers(settings)]


def _onnxruntime() -> Any:
    import onnxruntime  # noqa: PLC0415, of these engines alone

    return onnxruntime


def _open_on_cpu(path: Path, settings: Settings) -> Session:
    return open_session(path, settings, [_ON_CPU])


def _open_on_gpu(path: Path, settings: Settings, providers: Sequence[Provider]) -> Session:
    _onnxruntime().preload_dlls()  # finds CUDA and cuDNN in the wheels of this environment
    return open_session(path, settings, providers)


def _open_by_cuda(path: Path, settings: Settings) -> Session:
    return _open_on_gpu(path, settings, cuda_providers(settings))


def _open_by_tensorrt(path: Path, settings: Settings) -> Session:
    return _open_on_gpu(path, settings, tensorrt_providers(settings))


CPU = Engine(
    name="cpu",
    about="onnxruntime on the CPU",
    wheel="onnxruntime",
    precisions={"fp32": ConfigEntries(), "fp16": ConfigEntries()},
    opener=_open_on_cpu,
    operators=_ATTENTION,
)

CUDA = Engine(
    name="cuda",
    about="onnxruntime on a GPU",
    wheel=_GPU_WHEEL,
    precisions={"fp32": ConfigEntries(), "fp16": ConfigEntries()},
    opener=_open_by_cuda,
    accelerator="cuda",
    on_gpu=True,
    operators=_ATTENTION,
)

TENSORRT = Engine(
    name="tensorrt",
    about="onnxruntime with TensorRT",
    wheel=_GPU_WHEEL,
    precisions={
        "fp32": ConfigEntries({"precision_mode": "FP32", **_TENSORRT_CACHE}),
        "fp16": ConfigEntries({"precision_mode": "FP16", **_TENSORRT_CACHE}),
    },
    opener=_open_by_tensorrt,
    accelerator="tensorrt",
    on_gpu=True,
)
"""Without the fused operators, which TensorRT does not know; it fuses the plain forms itself."""
