"""Triton's `onnxruntime` backend for a server without a native one, through the onnxruntime wheel.

A model's config.pbtxt and 1/model.onnx are those of the native backend, and what that one refuses
at load is refused here, so what loads here loads there. Differences:

- Unset or 0, `intra_op_thread_count` means the cores that this process may use divided by the
  model's instances (the native backend: all cores for each). Each instance is a process of its own.
- One bad request in a joined batch gets the error alone; the native backend fails the whole batch.
- What cannot be carried through Python is refused at load: see `unsupported`.
- The accelerator openvino is the openvino wheel itself instead of a build of onnxruntime with it, and
  compiles for fixed shapes: see `openvino_graph`. The parameter openvino_precision is known here alone.

This file is copied alone into the server's backend folder.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

Config = dict[str, Any]  # a config.pbtxt as the server's JSON of it
Array = npt.NDArray[Any]
Provider = tuple[str, dict[str, str]]  # name, options
GraphTensors = dict[str, tuple[str, list[int]]]  # name: config.pbtxt's type, dims (-1: free)

TRITON_TYPES = {
    **{f"tensor({name})": f"TYPE_{name.upper()}" for name in ("bool", "string")},
    **{
        f"tensor({s}int{bits})": f"TYPE_{s}INT{bits}".upper()
        for s in ("", "u")
        for bits in (8, 16, 32, 64)
    },
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
}  # no bfloat16: neither numpy nor this server's Python models have it

# `optimization { graph { level } }`; any other level means 0, as in the native backend.
GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
EXECUTION_MODES = {"0": ort.ExecutionMode.ORT_SEQUENTIAL, "1": ort.ExecutionMode.ORT_PARALLEL}
SWITCH = {"1": True, "true": True, "0": False, "false": False}

DEFAULT_MAX_BATCH_SIZE = 4  # the native backend's `default-max-batch-size`

OPENVINO = "OpenVINO"  # not a provider of onnxruntime: it runs the whole graph
WHEELS = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
}
DEPRECATED_CUDA = (
    "cudnn_conv_algo_search",
    "gpu_mem_limit",
    "arena_extend_strategy",
    "do_copy_in_default_stream",
)
TENSORRT_NAMES = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
# The wheel takes only True and False for these, config.pbtxt also 1 and 0.
TENSORRT_SWITCH = re.compile("enable|use_native|dump|force|fallback|detailed")


class TritonPythonModel:
    """One model instance: one ONNX Runtime session in a process of its own."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in what `complete` fills in where config.pbtxt leaves out the inputs or the outputs.

        As in the native backend, a config with both is left as it is, max_batch_size included.
        """
        config = auto_complete_model_config.as_dict()  # not a copy: what changes here is used
        if not (config["input"] and config["output"]):
            options = session_options(config)
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            path = model_file(config, Path(pb_utils.get_model_dir()))
            complete(config, open_session(config, path, options, [("CPUExecutionProvider", {})]))
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph and check config.pbtxt against it; raises TritonModelException."""
        config = json.loads(args["model_config"])
        self.name, self.max_batch_size = config["name"], config["max_batch_size"]
        for feature in unsupported(config, args["model_instance_kind"]):
            raise refusal(
                config, f"{feature} is not supported by the pip-installed onnxruntime backend"
            )
        path = model_file(config, Path(args["model_repository"], args["model_version"]))
        wanted = providers(config, args["model_instance_kind"], args["model_instance_device_id"])
        options = session_options(config)
        self.session = open_session(config, path, options, wanted)
        self.run_options = run_options(config)
        # A graph's scalar is [1] in config.pbtxt, which cannot say [].
        self.scalar_inputs, self.scalar_outputs = check(config, self.session)
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']}: {', '.join(self.session.get_providers())}, "
            f"{options.intra_op_num_threads} intra-op threads"
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request, in order; requests of equal shapes share one session.run."""
        responses = [None] * len(requests)
        calls = []
        for index, request in enumerate(requests):
            try:
                calls.append(self._read(index, request))
            except ValueError as error:
                responses[index] = failure(self.name, error, pb_utils.TritonError.INVALID_ARG)
        for batch in join(calls, self.max_batch_size):
            for call, response in zip(batch, self._answer(batch), strict=True):
                responses[call.index] = response
        return responses

    def finalize(self) -> None:
        """Release the session, and with it the graph's memory and threads."""
        self.session = None

    def _read(self, index: int, request: Any) -> "ParsedRequest":
        """One request as arrays; all but strings are views of the server's memory, not copies."""
        feeds = {tensor.name(): as_array(tensor) for tensor in request.inputs()}
        rows = len(next(iter(feeds.values()))) if self.max_batch_size else 1
        if self.max_batch_size and rows > self.max_batch_size:
            raise ValueError(
                f"the request has {rows} rows, max_batch_size is {self.max_batch_size}"
            )
        for name in self.scalar_inputs & feeds.keys():
            feeds[name] = feeds[name].reshape(())  # (1,) → ()
        return ParsedRequest(index, rows, feeds, list(request.requested_output_names()))

    def _answer(self, batch: "list[ParsedRequest]") -> list[Any]:
        """A response for each call; a batch that fails is run again call by call."""
        try:
            return self._run(batch)
        except Exception as error:  # onnxruntime errors have no narrower base
            if len(batch) > 1:
                return [response for call in batch for response in self._answer([call])]
            return [failure(self.name, error, pb_utils.TritonError.INTERNAL)]

    def _run(self, batch: "list[ParsedRequest]") -> list[Any]:
        names = list(dict.fromkeys(name for call in batch for name in call.outputs))
        feeds = batch[0].feeds
        if len(batch) > 1:  # each (rows, …) → (sum of rows, …)
            feeds = {name: np.concatenate([call.feeds[name] for call in batch]) for name in feeds}
        arrays = dict(zip(names, self.session.run(names, feeds, self.run_options), strict=True))
        for name in self.scalar_outputs.keys() & arrays.keys():
            arrays[name] = np.asarray(arrays[name]).reshape(self.scalar_outputs[name])  # () → (1,)
        return self._split(batch, arrays)

    def _split(self, batch: "list[ParsedRequest]", arrays: dict[str, Array]) -> list[Any]:
        """A response for each call from its rows of the joined outputs, as views."""
        rows = sum(call.rows for call in batch)
        for name, array in arrays.items():
            if self.max_batch_size and len(array) != rows:
                raise RuntimeError(
                    f"output '{name}' has {len(array)} rows for {rows} rows of input: "
                    "a graph without a row of output for each row of input needs max_batch_size: 0"
                )
        responses, start = [], 0
        for call in batch:
            mine = slice(start, start + call.rows) if self.max_batch_size else ...
            outputs = [pb_utils.Tensor(name, arrays[name][mine]) for name in call.outputs]
            responses.append(pb_utils.InferenceResponse(output_tensors=outputs))
            start += call.rows
        return responses


@dataclass
class ParsedRequest:
    """A request's place among its mates, rows, input arrays by name, and wanted outputs."""

    index: int
    rows: int
    feeds: dict[str, Array]
    outputs: list[str]

    def shapes(self) -> frozenset[Any]:
        """Equal for calls that can be concatenated along their first axis."""
        return frozenset((name, array.shape[1:]) for name, array in self.feeds.items())


def join(calls: list[ParsedRequest], max_batch_size: int) -> list[list[ParsedRequest]]:
    """Calls in runs of equal shapes and at most `max_batch_size` rows; where 0, one by one."""
    runs: list[list[ParsedRequest]] = []
    filling: dict[frozenset[Any], list[ParsedRequest]] = {}
    for call in calls:
        run = filling.get(call.shapes()) if max_batch_size else None
        if run is None or sum(mate.rows for mate in run) + call.rows > max_batch_size:
            run = filling[call.shapes()] = []
            runs.append(run)
        run.append(call)
    return runs


def as_array(tensor: Any) -> Array:
    """What onnxruntime takes for a request's tensor: str where Triton has the bytes of UTF-8."""
    array: Array = tensor.as_numpy()
    if array.dtype != np.object_:
        return array
    try:
        text = [item.decode() for item in array.flat]
    except UnicodeDecodeError as error:
        raise ValueError(f"input '{tensor.name()}' must be UTF-8: {error}") from error
    return np.array(text, np.object_).reshape(array.shape)


def failure(model: str, error: Exception, code: Any) -> Any:
    message = f"model '{model}': {one_line(error)}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def refusal(config: Config, problem: str) -> Any:
    return pb_utils.TritonModelException(f"unable to load model '{config['name']}': {problem}")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def model_file(config: Config, folder: Path) -> Path:
    """model.onnx in a version's folder, or the file or folder that default_model_filename says."""
    path = folder / (config["default_model_filename"] or "model.onnx")
    if path.is_dir():
        path /= "model.onnx"
    if not path.is_file():
        raise refusal(config, f"{path} is missing; export it, or correct default_model_filename")
    return path


def open_session(config: Config, path: Path, options: Any, wanted: list[Provider]) -> Any:
    """A session with every provider of `wanted`: by default onnxruntime falls back in silence."""
    if any(name == OPENVINO for name, _ in wanted):
        return open_openvino(config, path, options.intra_op_num_threads)
    if any(name == "CUDAExecutionProvider" for name, _ in wanted):
        ort.preload_dlls()  # finds CUDA and cuDNN in the wheels of this environment
    try:
        session = ort.InferenceSession(str(path), options, providers=wanted, enable_fallback=0)
    except Exception as error:  # onnxruntime errors have no narrower base
        raise refusal(
            config, f"onnxruntime cannot open {path}: {one_line(error)}; export it again"
        ) from None
    for name, _ in wanted:
        if name not in session.get_providers():
            reason = "the server's log names the library that is missing"
            raise refusal(config, f"{name} did not start; {reason}, or use KIND_CPU")
    return session


def open_openvino(config: Config, path: Path, threads: int) -> Any:
    try:
        from panotriton.server import openvino_graph  # noqa: PLC0415, of this accelerator alone
    except ImportError as error:
        problem = f"the accelerator openvino needs {error.name}: pip install openvino"
        raise refusal(config, f"{problem}, or export with --provider cpu") from None
    precisions = {name: name for name in openvino_graph.PRECISIONS}
    precision = choice(config, "openvino_precision", precisions, "fp32")
    if precision == "bf16" and not openvino_graph.has_bf16():
        pb_utils.Logger.log_warn(f"{config['name']}: fp32, since this CPU has no bfloat16")
        precision = "fp32"
    try:
        return openvino_graph.OpenVINOGraph(path, threads=threads, precision=precision)
    except RuntimeError as error:
        problem = f"OpenVINO cannot open {path}: {one_line(error)}"
        raise refusal(config, f"{problem}; export it again") from None


def session_options(config: Config) -> Any:
    options = ort.SessionOptions()
    level = config.get("optimization", {}).get("graph", {}).get("level", 0)
    options.graph_optimization_level = GRAPH_LEVELS.get(level, GRAPH_LEVELS[0])
    options.execution_mode = choice(config, "execution_mode", EXECUTION_MODES, "0")
    options.intra_op_num_threads = threads(config, "intra_op_thread_count")
    options.inter_op_num_threads = threads(config, "inter_op_thread_count")
    options.enable_cpu_mem_arena = choice(config, "enable_mem_arena", SWITCH, "1")
    options.enable_mem_pattern = choice(config, "enable_mem_pattern", SWITCH, "1")
    # Each instance is a process of its own: a thread that spins between runs takes a core from others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    allocator = "session.use_device_allocator_for_initializers"
    options.add_session_config_entry(allocator, parameter(config, allocator, "0"))
    for library in config.get("model_operations", {}).get("op_library_filename", []):
        options.register_custom_ops_library(library)
    return options


def run_options(config: Config) -> Any:
    options = ort.RunOptions()
    shrinkage = "memory.enable_memory_arena_shrinkage"
    if parameter(config, shrinkage):
        options.add_run_config_entry(shrinkage, parameter(config, shrinkage))
    return options


def parameter(config: Config, key: str, default: str = "") -> str:
    value: str = config.get("parameters", {}).get(key, {}).get("string_value", default)
    return value


def choice(config: Config, key: str, choices: dict[str, Any], default: str) -> Any:
    text = parameter(config, key, default)
    if text.lower() not in choices:
        raise refusal(config, f"parameter {key} is '{text}', expected one of {', '.join(choices)}")
    return choices[text.lower()]


def threads(config: Config, key: str) -> int:
    """The count that a parameter gives, else this process's cores shared out over the instances."""
    text = parameter(config, key, "0")
    if not re.fullmatch(r"-?\d+", text):
        raise refusal(config, f"parameter {key} is '{text}', expected a whole number")
    groups = config.get("instance_group", [])
    instances = sum(group["count"] * max(1, len(group.get("gpus", []))) for group in groups)
    share = len(os.sched_getaffinity(0)) // max(1, instances)
    return int(text) if int(text) > 0 else max(1, share)


def unsupported(config: Config, kind: str) -> list[str]:
    """What config.pbtxt asks for, the native backend has, and would be ignored here."""
    asked: dict[str, Any] = {field: config.get(field) for field in ("batch_input", "batch_output")}
    asked["sequence_batching"] = "sequence_batching" in config
    asked["decoupled"] = pb_utils.using_decoupled_model_transaction_policy(config)
    asked["allow_ragged_batch"] = any(entry.get("allow_ragged_batch") for entry in config["input"])
    on_gpu = parameter(config, "FORCE_CPU_ONLY_INPUT_TENSORS") == "no"
    asked["parameter FORCE_CPU_ONLY_INPUT_TENSORS: no"] = on_gpu
    for key in DEPRECATED_CUDA:
        where = f"parameter {key} (deprecated: give it to gpu_execution_accelerator 'cuda')"
        asked[where] = kind == "GPU" and parameter(config, key)
    return [feature for feature, is_asked in asked.items() if is_asked]


def providers(config: Config, kind: str, device_id: str) -> list[Provider]:
    """(provider, its options), best first; refuses those that the installed wheel lacks.

    As in the native backend, GPU accelerators count for KIND_GPU instances only.
    """
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    on_gpu = accelerators.get("gpu_execution_accelerator", []) if kind == "GPU" else []
    on_cpu = accelerators.get("cpu_execution_accelerator", [])
    for accelerator in on_gpu + on_cpu:
        known = ("tensorrt", "cuda") if accelerator in on_gpu else ("openvino",)
        if accelerator["name"] not in known:
            unknown = f"unknown execution accelerator '{accelerator['name']}'"
            raise refusal(config, f"{unknown}, expected {' or '.join(known)}")
    options = {each["name"]: each.get("parameters", {}) for each in on_gpu + on_cpu}
    wanted: list[Provider] = []
    if "tensorrt" in options:
        tensorrt = {**tensorrt_options(config, options["tensorrt"]), "device_id": device_id}
        wanted.append(("TensorrtExecutionProvider", tensorrt))
    if kind == "GPU":
        cuda = {**options.get("cuda", {}), "device_id": device_id}
        wanted.append(("CUDAExecutionProvider", cuda))
    if "openvino" in options and not wanted:
        return [(OPENVINO, {})]
    for name, _ in wanted:
        if name not in ort.get_available_providers():
            raise refusal(
                config,
                f"{name} is not in the installed onnxruntime {ort.__version__}: pip install "
                f"{WHEELS[name]} in its place, or use KIND_CPU without execution accelerators",
            )
    return [*wanted, ("CPUExecutionProvider", {})]


def tensorrt_options(config: Config, parameters: dict[str, str]) -> dict[str, str]:
    options = {}
    for key, value in parameters.items():
        name = TENSORRT_NAMES.get(key, key)
        if key == "precision_mode" and value in ("FP32", "FP16", "BF16", "INT8"):
            if value != "FP32":
                options[f"trt_{value.lower()}_enable"] = "True"
        elif not name.startswith("trt_"):
            raise refusal(config, f"unknown tensorrt parameter {key}: '{value}'")
        elif TENSORRT_SWITCH.search(name):
            options[name] = {"1": "True", "0": "False"}.get(value, value)
        else:
            options[name] = value
    return options


def check(config: Config, session: Any) -> tuple[set[str], dict[str, list[int]]]:
    """Check config.pbtxt against the graph.

    Returns the names of scalar inputs, and of scalar outputs with the shapes to give them.
    """
    inputs = graph_tensors(config, session.get_inputs())
    # Initializers that are inputs too may be given or left out.
    defaults = graph_tensors(config, session.get_overridable_initializers())
    outputs = graph_tensors(config, session.get_outputs())
    for entry in config["input"]:
        check_tensor(config, f"input '{entry['name']}'", entry, {**inputs, **defaults})
        if entry.get("optional") and config["max_batch_size"]:
            raise refusal(config, f"optional input '{entry['name']}' needs max_batch_size: 0")
    for entry in config["output"]:
        check_tensor(config, f"output '{entry['name']}'", entry, outputs, exact=True)
    given = {entry["name"] for entry in config["input"] if not entry.get("optional")}
    if given != inputs.keys():
        raise refusal(
            config,
            f"inputs that every request must give are {sorted(given)} in config.pbtxt but "
            f"{sorted(inputs)} in the graph; only those with a default in the graph may be, and "
            "must be, optional: true",
        )
    scalars = {name for name, (_, dims) in {**inputs, **defaults}.items() if not dims}
    shapes = {each["name"]: entry_dims(each) for each in config["output"]}
    return scalars, {name: dims for name, dims in shapes.items() if not outputs[name][1]}


def graph_tensors(config: Config, nodes: Iterable[Any]) -> GraphTensors:
    """Raises TritonModelException for what is no tensor, or of a type that cannot be passed."""
    tensors = {}
    for node in nodes:
        if node.type not in TRITON_TYPES:
            expected = ", ".join(TRITON_TYPES)
            raise refusal(
                config, f"'{node.name}' is {node.type} in the graph, export as {expected}"
            )
        dims = [dim if isinstance(dim, int) else -1 for dim in node.shape]
        tensors[node.name] = (TRITON_TYPES[node.type], dims)
    return tensors


def check_tensor(
    config: Config, label: str, entry: Config, graph: GraphTensors, exact: bool = False
) -> None:
    """One tensor of config.pbtxt against the graph; `exact` also refuses to narrow a free dim."""
    if entry["name"] not in graph:
        raise refusal(config, f"{label} is not in the graph, which has {sorted(graph)}")
    data_type, dims = graph[entry["name"]]
    if entry["data_type"] != data_type:
        found = f"{label} is {entry['data_type']} in config.pbtxt"
        raise refusal(config, f"{found} but {data_type} in the graph; write {data_type}")
    batch = [-1] if config["max_batch_size"] else []
    if batch and dims[:1] != batch:
        raise refusal(
            config,
            f"{label} is {dims} in the graph, expected a free first dimension since max_batch_size "
            f"is {config['max_batch_size']}; export with a dynamic batch or set max_batch_size: 0",
        )
    written = batch + entry_dims(entry)
    if not fits(written, dims, exact):
        raise refusal(
            config,
            f"{label} is {written} in config.pbtxt{' (batch first)' if batch else ''} but {dims} "
            f"in the graph; write dims: {dims[len(batch) :] or [1]}",
        )


def fits(written: list[int], dims: list[int], exact: bool) -> bool:
    if not dims:
        return all(dim == 1 for dim in written)
    return len(written) == len(dims) and all(
        mine == theirs or (theirs == -1 and not exact)
        for mine, theirs in zip(written, dims, strict=True)
    )


def entry_dims(entry: Config) -> list[int]:
    """The shape that the graph sees: `reshape` where there is one; without the batch dimension."""
    dims: list[int] = entry["reshape"].get("shape", []) if "reshape" in entry else entry["dims"]
    return dims


def complete(config: Config, session: Any) -> None:
    """Write max_batch_size, dynamic_batching and the inputs or outputs that are missing.

    As in the native backend, a graph whose every first dimension is free is taken to batch.
    """
    tensors = {
        "input": graph_tensors(config, session.get_inputs()),
        "output": graph_tensors(config, session.get_outputs()),
    }
    if all(dims[:1] == [-1] for side in tensors.values() for _, dims in side.values()):
        config["max_batch_size"] = config["max_batch_size"] or DEFAULT_MAX_BATCH_SIZE
        if config["max_batch_size"] > 1 and "sequence_batching" not in config:
            config.setdefault("dynamic_batching", {})
    elif config["max_batch_size"]:
        problem = f"max_batch_size is {config['max_batch_size']} but a first dimension is fixed"
        raise refusal(config, f"{problem}; export with a dynamic batch or set max_batch_size: 0")
    for side, found in tensors.items():
        config[side] = config[side] or [completed(config, *item) for item in found.items()]


def completed(config: Config, name: str, tensor: tuple[str, list[int]]) -> Config:
    data_type, dims = tensor
    dims = dims[1:] if config["max_batch_size"] else dims
    entry: Config = {"name": name, "data_type": data_type, "dims": dims or [1]}
    if not dims and config["max_batch_size"]:
        entry["reshape"] = {"shape": []}
    return entry
