"""Graphs run by onnxruntime, on CPUs and on NVIDIA's GPUs, with TensorRT there where asked for.

Which parameters a config.pbtxt may have, and what they mean, is as in Triton's own onnxruntime backend.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panotriton.errors import EngineError
from panotriton.server.engines.engine import ConfigEntries, Engine, Settings
from panotriton.server.engines.memory import check_share, share
from panotriton.server.engines.per_shape import PerShape
from panotriton.server.engines.shapes import EXPECTED, Shapes, text_of

__all__ = ["CPU", "CUDA", "TENSORRT", "ShapedSessions", "by_providers"]

Provider = tuple[str, Mapping[str, str]]  # onnxruntime's name for what computes, options
_Key = tuple[tuple[str, tuple[int, ...]], ...]  # shapes of the inputs, in the order of their names

_ON_CPU: Provider = ("CPUExecutionProvider", {})
_CUDA_PROVIDER = "CUDAExecutionProvider"
_DEVICES = {_CUDA_PROVIDER: "cuda"}
_NOT_OPTIMISED = 2
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

# Measured on one H200, docs/PERFORMANCE.md: with the fused group norm NHWC takes half to four fifths of the
# time; the heuristic search finds convolutions as quick as the exhaustive one's, in a fraction of the time.
# Each session has an arena of its own, whose needs never change: it need not double each time it grows.
_CUDA_OPTIONS = {
    "prefer_nhwc": "1",
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",
}

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
    "trt_engine_cache_path": "/var/cache/panotriton/tensorrt",
}
_KEPT_SESSIONS = 8
# Of an arena, of cuDNN, of cuBLAS, of the driver; none has a type of its own in Python.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate memory|ALLOC_FAILED|bad_alloc", re.IGNORECASE
)
_GRAPHS = "cuda_graphs"  # parameter: a run is recorded once for each shape and replayed
_NUMPY = {"float": "float32", "double": "float64"}  # onnxruntime's names where numpy's are others


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


class BoundSession(Session):
    """A session of fixed shapes whose inputs and outputs stay at the same addresses of a device.

    As a CUDA graph needs them. device: onnxruntime's name, "cuda" or "cpu". Raises EngineError for a graph
    whose outputs' shapes do not follow from its inputs'.
    """

    def __init__(self, session: Any, run_options: Any, device: str, number: int) -> None:
        super().__init__(session, run_options)
        free = [each.name for each in session.get_outputs() if not _is_fixed(each.shape)]
        if free:
            raise EngineError(
                f"the shapes of {', '.join(free)} do not follow from the inputs'; leave {_GRAPHS} out"
            )
        self._on_cpu = device == "cpu"
        binding = session.io_binding()
        self._fed, self._found = (
            {each.name: _buffer(each, device, number) for each in side}
            for side in (session.get_inputs(), session.get_outputs())
        )
        for name, buffer in self._fed.items():
            binding.bind_ortvalue_input(name, buffer)
        for name, buffer in self._found.items():
            binding.bind_ortvalue_output(name, buffer)
        self._run = partial(session.run_with_iobinding, binding, run_options)

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The named outputs, as arrays of their own."""
        for name, array in feeds.items():
            self._fed[name].update_inplace(np.ascontiguousarray(array))
        self._run()
        arrays = [self._found[name].numpy() for name in outputs]
        return [array.copy() for array in arrays] if self._on_cpu else arrays  # a view there


class ShapedSessions:
    """A graph with a session of its own for each shape of its inputs, the last used; for one thread.

    Since 1.20, onnxruntime's convolutions on a GPU plan anew whenever the shape differs from that of the
    call before, for 0.1 to 3 s. Each session holds the weights once more, and what it computes in. `room` are
    kept, as many as shapes are expected at least; where memory runs out all the same, those of other shapes
    go. describing: a session for any shape, only asked what the graph is. open_one: opens for shapes.
    """

    def __init__(
        self,
        describing: Any,
        open_one: Callable[[Mapping[str, int]], Session],
        settings: Settings,
        providers: Sequence[str],
        room: int,
    ) -> None:
        self._inputs, self._outputs, self._defaults = (
            [SimpleNamespace(name=each.name, type=each.type, shape=each.shape) for each in side]
            for side in (
                describing.get_inputs(),
                describing.get_outputs(),
                describing.get_overridable_initializers(),
            )
        )
        self._providers = list(providers)
        self._open_one = open_one
        self._report = settings.report
        expected = settings.shapes.expected if settings.shapes else ()
        self._expected = {tuple(sorted(each.items())) for each in expected}
        self._sessions = PerShape(self._open, max(room, len(self._expected), 1))

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The named outputs, as arrays of their own."""
        key = tuple(sorted((name, array.shape) for name, array in feeds.items()))
        try:
            return self._sessions[key].run(outputs, feeds)
        except Exception as error:  # onnxruntime's have no common class
            if not _OUT_OF_MEMORY.search(str(error)):
                raise
            self._report(f"{text_of([dict(key)])}: no memory; closing the sessions of other shapes")
            self._sessions.clear()
        return self._sessions[key].run(outputs, feeds)

    def zeros(self) -> list[dict[str, NDArray[Any]]]:
        """What to run once so that every expected shape has been seen."""
        types = {each.name: each.type for each in self._inputs}
        return [
            {name: np.zeros(shape, _numpy_type(types[name])) for name, shape in key}
            for key in sorted(self._expected)
        ]

    def get_inputs(self) -> list[SimpleNamespace]:
        """name, type and shape of each, as onnxruntime writes them."""
        return self._inputs

    def get_outputs(self) -> list[SimpleNamespace]:
        """name, type and shape of each, as onnxruntime writes them."""
        return self._outputs

    def get_overridable_initializers(self) -> list[SimpleNamespace]:
        """name, type and shape of each, as onnxruntime writes them."""
        return self._defaults

    def get_providers(self) -> list[str]:
        """What computes."""
        return self._providers

    def _open(self, key: _Key) -> Session:
        if key not in self._expected:
            text = text_of([dict(key)])
            self._report(f"{text}: not an expected shape, so opened only now; export with --shapes")
        shapes = dict(key)
        sides = (
            zip(each.shape, shapes[each.name], strict=True)
            for each in self._inputs
            if each.name in shapes
        )
        return self._open_one({name: n for side in sides for name, n in side if _is_name(name)})


def by_providers(names: Sequence[str]) -> Engine:
    """What onnxruntime has under these names, best first, whatever a config says."""
    return replace(CPU, opener=partial(open_session, providers=[(name, {}) for name in names]))


def open_session(
    path: Path, settings: Settings, providers: Sequence[Provider]
) -> Session | ShapedSessions:
    """A session with every one of `providers`: by default onnxruntime falls back in silence.

    One for each shape where the settings fix shapes. Raises EngineError for providers that the installed
    wheel lacks or that do not start.
    """
    ort = _onnxruntime()
    for name, _ in providers:
        if name not in ort.get_available_providers():
            raise EngineError(
                f"{name} is not in the installed onnxruntime {ort.__version__}: pip install "
                f"{_GPU_WHEEL} in its place, or use KIND_CPU without execution accelerators"
            )
    if settings.shapes is None:
        return Session(_session(path, session_options(settings), providers), run_options(settings))
    plain = session_options(replace(settings, graph_level=_NOT_OPTIMISED))
    open_one = partial(_open_shape, path, settings, providers)
    found = share(path, settings)
    room = _KEPT_SESSIONS if found is None else min(_KEPT_SESSIONS, found.sessions)
    # TensorRT would build an engine to describe the graph; CUDA, which follows it, knows the operators, too.
    describing = providers[-2:]
    names = [name for name, _ in providers]
    return ShapedSessions(_session(path, plain, describing), open_one, settings, names, room)


def _session(path: Path, options: Any, providers: Sequence[Provider]) -> Any:
    session = _onnxruntime().InferenceSession(
        str(path), options, providers=list(providers), enable_fallback=0
    )
    for name, _ in providers:
        if name not in session.get_providers():
            reason = "the server's log names the library that is missing"
            raise EngineError(f"{name} did not start; {reason}, or use KIND_CPU")
    return session


def _open_shape(
    path: Path, settings: Settings, providers: Sequence[Provider], sides: Mapping[str, int]
) -> Session:
    """A session that knows how long each free side is, by the side's name."""
    options = session_options(settings)
    for name, length in sides.items():
        options.add_free_dimension_override_by_name(name, length)
    if not settings.choice(_GRAPHS, _SWITCH, "0"):
        return Session(_session(path, options, providers), run_options(settings))
    device = _DEVICES.get(providers[0][0], "cpu")
    graphs = [
        (name, {**values, "enable_cuda_graph": "1"} if name == _CUDA_PROVIDER else values)
        for name, values in providers
    ]
    session = _session(path, options, graphs)
    return BoundSession(session, run_options(settings), device, int(settings.device))


def _buffer(tensor: Any, device: str, number: int) -> Any:
    ort_value = _onnxruntime().OrtValue
    kind = _numpy_type(tensor.type)
    return ort_value.ortvalue_from_shape_and_type(tensor.shape, kind, device, number)


def _numpy_type(name: str) -> np.dtype[Any]:
    """Of "tensor(float16)"."""
    kind = name.removeprefix("tensor(").removesuffix(")")
    return np.dtype(_NUMPY.get(kind, kind))


def _is_fixed(shape: Sequence[Any]) -> bool:
    return all(isinstance(side, int) for side in shape)


def _is_name(side: Any) -> bool:
    return isinstance(side, str)


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
    # With fixed shapes the second run would take all its memory at once, and keep what the first took piece
    # by piece.
    pattern = "1" if settings.shapes is None else "0"
    options.enable_mem_pattern = settings.choice("enable_mem_pattern", _SWITCH, pattern)
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
    return [(_CUDA_PROVIDER, {**options, "device_id": settings.device}), _ON_CPU]


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


def _open_on_cpu(path: Path, settings: Settings) -> Session | ShapedSessions:
    return open_session(path, settings, [_ON_CPU])


def _open_on_gpu(
    path: Path, settings: Settings, providers: Sequence[Provider]
) -> Session | ShapedSessions:
    check_share(path, settings)
    _onnxruntime().preload_dlls()  # finds CUDA and cuDNN in the wheels of this environment
    return open_session(path, settings, providers)


def _open_by_cuda(path: Path, settings: Settings) -> Session | ShapedSessions:
    return _open_on_gpu(path, settings, cuda_providers(settings))


def _open_by_tensorrt(path: Path, settings: Settings) -> Session | ShapedSessions:
    _make_cache(settings)
    return _open_on_gpu(path, settings, tensorrt_providers(settings))


def _make_cache(settings: Settings) -> None:
    """onnxruntime makes no folders above the cache's own. Raises EngineError where there can be none."""
    folder = settings.accelerators.get(TENSORRT.accelerator, {}).get("trt_engine_cache_path")
    try:
        Path(folder or ".").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(
            f"trt_engine_cache_path {folder} cannot be made ({error.strerror}): name another in the "
            "network's config.pbtxt, of a folder that the server may write to"
        ) from error


def _expected(shapes: Sequence[Shapes]) -> ConfigEntries:
    return ConfigEntries(parameters={EXPECTED: text_of(shapes)})


def _profile(shapes: Sequence[Shapes]) -> ConfigEntries:
    """TensorRT builds one engine that is quickest for the last of the shapes and takes all between."""
    sides = {name: [each[name] for each in shapes] for name in shapes[0]}
    kinds = {
        "min": {name: tuple(map(min, *each)) for name, each in sides.items()},
        "opt": shapes[-1],
        "max": {name: tuple(map(max, *each)) for name, each in sides.items()},
    }
    return ConfigEntries(
        {
            f"trt_profile_{kind}_shapes": text_of([each]).replace(", ", ",").replace(" ", ":")
            for kind, each in kinds.items()
        }
    )


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
    precisions={"fp32": ConfigEntries(_CUDA_OPTIONS), "fp16": ConfigEntries(_CUDA_OPTIONS)},
    opener=_open_by_cuda,
    accelerator="cuda",
    on_gpu=True,
    operators=_ATTENTION | {"GroupNorm"},
    # Of the UNet: a pair of 512×1024 px ×2 has 8 tiles, an in-between view 4, a smaller image one.
    fixed_batches={
        "osediff_tagger": (1, 4),
        "osediff_text_encoder": (1, 4),
        "osediff_vae_encoder": (1,),
        "osediff_unet": (1, 4, 8),
        "osediff_vae_decoder": (1,),
    },
    shape_entries=_expected,
    # With the scorer's half all of it. Of 24 GB the denoiser's three sessions at Stable Diffusion's size fit.
    memory_fractions={
        "osediff_tagger": 0.06,
        "osediff_text_encoder": 0.06,
        "osediff_vae_encoder": 0.07,
        "osediff_unet": 0.24,
        "osediff_vae_decoder": 0.07,
    },
    backend="panotriton_onnxruntime",
)
"""Under a backend name of our own: NVIDIA's container has a native `onnxruntime` backend, which opens one
session a graph, feeds it batches of any size, and so plans anew at nearly every call."""

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
    batches={"osediff_vae_encoder": 1, "osediff_vae_decoder": 1},
    shape_entries=_profile,
)
"""Without the fused operators, which TensorRT does not know; it fuses the plain forms itself."""
