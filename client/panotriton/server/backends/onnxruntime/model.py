"""Triton's `onnxruntime` backend for a server without a native one, through the engines' wheels.

A model's config.pbtxt and 1/model.onnx are those of the native backend, and what that one refuses
at load is refused here, so what loads here loads there. Differences:

- Unset or 0, `intra_op_thread_count` means the cores that this process may use divided by the
  model's instances (the native backend: all cores for each). Each instance is a process of its own.
- One bad request in a joined batch gets the error alone; the native backend fails the whole batch.
- What cannot be carried through Python is refused at load: see `unsupported`.
- What computes is an engine of `panotriton.server.engines`, the one that answers to the accelerator that
  config.pbtxt names. openvino is OpenVINO's own wheel instead of a build of onnxruntime with it, and
  compiles for fixed shapes; the parameter openvino_precision is known here alone.
- With the parameter `fixed_batches` a network sees batches of those sizes alone: rows of zeros fill one up
  and are dropped from the outputs. Those of `expected_shapes` are run once at load. Every shape has a
  session of its own.

It also goes by the name of `panotriton_onnxruntime`, for GPUs: where a server has a native `onnxruntime`,
that one would be chosen for the other name. This file is copied alone into the server's backend folder;
it imports the panotriton that is installed.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from panotriton.errors import EngineError
from panotriton.server.engines import CPU, Graph, Settings, engine_of
from panotriton.server.engines.onnxruntime import ShapedSessions
from panotriton.server.engines.shapes import FixedShapes, text_of

Config = dict[str, Any]  # a config.pbtxt as the server's JSON of it
Array = npt.NDArray[Any]
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

NOT_OPTIMISED = 2  # `optimization { graph { level } }`
DEFAULT_MAX_BATCH_SIZE = 4  # the native backend's `default-max-batch-size`

DEPRECATED_CUDA = (
    "cudnn_conv_algo_search",
    "gpu_mem_limit",
    "arena_extend_strategy",
    "do_copy_in_default_stream",
)


class TritonPythonModel:
    """One model instance: one opened graph in a process of its own."""

    shapes: FixedShapes | None = None

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in what `complete` fills in where config.pbtxt leaves out the inputs or the outputs.

        As in the native backend, a config with both is left as it is, max_batch_size included.
        """
        config = auto_complete_model_config.as_dict()  # not a copy: what changes here is used
        if not (config["input"] and config["output"]):
            path = model_file(config, Path(pb_utils.get_model_dir()))
            with refusing(config):
                settings = replace(Settings.of(config), graph_level=NOT_OPTIMISED)
                graph = CPU.open(path, settings)
            complete(config, graph)
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph and check config.pbtxt against it; raises TritonModelException."""
        config = json.loads(args["model_config"])
        self.name, self.max_batch_size = config["name"], config["max_batch_size"]
        on_gpu = args["model_instance_kind"] == "GPU"
        for feature in unsupported(config, on_gpu):
            raise refusal(
                config, f"{feature} is not supported by the pip-installed onnxruntime backend"
            )
        path = model_file(config, Path(args["model_repository"], args["model_version"]))
        self.graph, settings = open_graph(config, path, on_gpu, args["model_instance_device_id"])
        self.shapes = settings.shapes
        if self.shapes and self.shapes.batches[-1] != self.max_batch_size:
            largest, most = self.shapes.batches[-1], self.max_batch_size
            raise refusal(config, f"fixed_batches end at {largest} but max_batch_size is {most}")
        # A graph's scalar is [1] in config.pbtxt, which cannot say [].
        self.scalar_inputs, self.scalar_outputs = check(config, self.graph)
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']}: {', '.join(self.graph.get_providers())}, "
            f"{settings.threads} intra-op threads"
        )
        self._warm_up([entry["name"] for entry in config["output"]], args["model_instance_name"])

    def _warm_up(self, outputs: list[str], instance: str) -> None:
        """Run every expected shape once, so that the first request is as quick as the tenth."""
        for feeds in self.graph.zeros() if isinstance(self.graph, ShapedSessions) else ():
            began = time.perf_counter()
            self.graph.run(outputs, feeds)
            shapes = text_of([{name: array.shape for name, array in feeds.items()}])
            took = time.perf_counter() - began
            pb_utils.Logger.log_info(f"{instance}: {shapes} opened and run in {took:.1f} s")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request, in order; requests of equal shapes share one run."""
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
        """Release the graph, and with it its memory and threads."""
        del self.graph

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
        rows = sum(call.rows for call in batch)
        feeds = batch[0].feeds
        filling = self.shapes.rows(rows) - rows if self.shapes else 0
        if len(batch) > 1 or filling:  # each (rows, …) → (sum of rows, and filling, …)
            feeds = {name: joined([c.feeds[name] for c in batch], filling) for name in feeds}
        arrays = dict(zip(names, self.graph.run(names, feeds), strict=True))
        if filling:
            arrays = {name: array[: len(array) - filling] for name, array in arrays.items()}
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


def joined(arrays: list[Array], filling: int) -> Array:
    """The arrays' rows, and so many of zeros."""
    if filling:
        first = arrays[0]
        nothing = "" if first.dtype == np.object_ else 0
        arrays = [*arrays, np.full((filling, *first.shape[1:]), nothing, first.dtype)]
    return np.concatenate(arrays)


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


@contextmanager
def refusing(config: Config) -> Iterator[None]:
    """What an engine cannot do is said as a refusal to load the model."""
    try:
        yield
    except EngineError as error:
        raise refusal(config, str(error)) from None


def open_graph(config: Config, path: Path, on_gpu: bool, device: str) -> tuple[Graph, Settings]:
    """The graph, opened by the engine that config.pbtxt asks for, and what that was told."""

    def warn(line: str) -> None:
        pb_utils.Logger.log_warn(f"{config['name']}: {line}")

    with refusing(config):
        settings = Settings.of(config, device=device, report=warn)
        return engine_of(config, on_gpu=on_gpu).open(path, settings), settings


def parameter(config: Config, key: str) -> str:
    value: str = config.get("parameters", {}).get(key, {}).get("string_value", "")
    return value


def unsupported(config: Config, on_gpu: bool) -> list[str]:
    """What config.pbtxt asks for, the native backend has, and would be ignored here."""
    asked: dict[str, Any] = {field: config.get(field) for field in ("batch_input", "batch_output")}
    asked["sequence_batching"] = "sequence_batching" in config
    asked["decoupled"] = pb_utils.using_decoupled_model_transaction_policy(config)
    asked["allow_ragged_batch"] = any(entry.get("allow_ragged_batch") for entry in config["input"])
    stays = parameter(config, "FORCE_CPU_ONLY_INPUT_TENSORS") == "no"
    asked["parameter FORCE_CPU_ONLY_INPUT_TENSORS: no"] = stays
    for key in DEPRECATED_CUDA:
        where = f"parameter {key} (deprecated: give it to gpu_execution_accelerator 'cuda')"
        asked[where] = on_gpu and parameter(config, key)
    return [feature for feature, is_asked in asked.items() if is_asked]


def check(config: Config, graph: Graph) -> tuple[set[str], dict[str, list[int]]]:
    """Check config.pbtxt against the graph.

    Returns the names of scalar inputs, and of scalar outputs with the shapes to give them.
    """
    inputs = graph_tensors(config, graph.get_inputs())
    # Initializers that are inputs too may be given or left out.
    defaults = graph_tensors(config, graph.get_overridable_initializers())
    outputs = graph_tensors(config, graph.get_outputs())
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


def complete(config: Config, graph: Graph) -> None:
    """Write max_batch_size, dynamic_batching and the inputs or outputs that are missing.

    As in the native backend, a graph whose every first dimension is free is taken to batch.
    """
    tensors = {
        "input": graph_tensors(config, graph.get_inputs()),
        "output": graph_tensors(config, graph.get_outputs()),
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
