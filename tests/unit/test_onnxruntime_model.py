"""The Python `onnxruntime` backend without a server: batching, options, providers, checks."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import onnxruntime as ort
import pytest

import panotriton
from panotriton.server import openvino_graph

MODEL = Path(panotriton.__file__).parent / "server" / "backends" / "onnxruntime" / "model.py"


class TritonModelException(Exception):
    pass


class TritonError:
    INVALID_ARG, INTERNAL = "invalid", "internal"

    def __init__(self, message, code):
        self.message, self.code = message, code


class Tensor:
    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class Request:
    def __init__(self, outputs=("y",), **arrays):
        self._inputs = [Tensor(name, array) for name, array in arrays.items()]
        self._outputs = outputs

    def inputs(self):
        return self._inputs

    def requested_output_names(self):
        return self._outputs


@pytest.fixture
def backend(monkeypatch) -> ModuleType:
    """model.py, imported with stand-ins for what the server's stub provides."""
    utils = ModuleType("triton_python_backend_utils")
    utils.TritonModelException, utils.TritonError, utils.Tensor = (
        TritonModelException,
        TritonError,
        Tensor,
    )
    utils.InferenceResponse = lambda output_tensors=(), error=None: SimpleNamespace(
        outputs={t.name(): t.as_numpy() for t in output_tensors}, error=error
    )
    utils.using_decoupled_model_transaction_policy = lambda config: config.get("decoupled", False)
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    spec = importlib.util.spec_from_file_location("onnxruntime_backend", MODEL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Session:
    """y = 2·x; raises where a row holds a 13. Remembers the rows of each run."""

    def __init__(self):
        self.runs: list[int] = []
        self.fed: list[np.ndarray] = []

    def run(self, names, feeds, options):
        self.runs.append(len(feeds["x"]))
        self.fed.append(feeds["x"])
        if (feeds["x"] == 13).any():
            raise RuntimeError("13\nis bad")
        return [2 * feeds["x"] for _ in names]


@pytest.fixture
def instance(backend):
    model = backend.TritonPythonModel()
    model.name, model.max_batch_size = "twice", 4
    model.scalar_inputs, model.scalar_outputs = set(), {}
    model.session, model.run_options = Session(), None
    return model


def rows(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]  # (rows, 1)


# --- batching


def test_requests_of_equal_shape_share_a_run(instance):
    sent = [rows(1), rows(2, 3), rows(4)]
    responses = instance.execute([Request(x=x) for x in sent])
    assert instance.session.runs == [4]
    for x, response in zip(sent, responses, strict=True):
        np.testing.assert_array_equal(response.outputs["y"], 2 * x)


def test_a_run_never_exceeds_max_batch_size(instance):
    instance.execute([Request(x=rows(*range(count))) for count in (3, 2, 2, 1)])
    assert instance.session.runs == [3, 4, 1]


def test_other_shapes_run_apart_and_answers_keep_their_order(instance):
    sent = [rows(1), np.ones((1, 2), np.float32), rows(3)]
    responses = instance.execute([Request(x=x) for x in sent])
    assert instance.session.runs == [2, 1]
    assert [r.outputs["y"].shape for r in responses] == [(1, 1), (1, 2), (1, 1)]
    assert responses[2].outputs["y"] == 6


def test_without_batching_each_request_runs_alone(instance):
    instance.max_batch_size = 0
    responses = instance.execute([Request(x=rows(1, 2)), Request(x=rows(3))])
    assert instance.session.runs == [2, 1]
    assert responses[0].outputs["y"].shape == (2, 1)


def test_a_lone_request_is_not_copied_and_outputs_are_views(instance):
    x = rows(1, 2)
    instance.execute([Request(x=x)])
    assert instance.session.fed[0] is x
    both = instance.execute([Request(x=rows(1)), Request(x=rows(2))])
    assert both[0].outputs["y"].base is both[1].outputs["y"].base is not None


def test_one_bad_request_fails_alone(instance):
    good, bad, last = instance.execute([Request(x=rows(value)) for value in (1, 13, 2)])
    assert (good.error, last.error) == (None, None)
    assert bad.error.message == "model 'twice': 13 is bad"
    assert bad.error.code == TritonError.INTERNAL
    assert instance.session.runs == [3, 1, 1, 1]


def test_more_rows_than_max_batch_size_are_the_callers_error(instance):
    too_many, good = instance.execute([Request(x=rows(*range(5))), Request(x=rows(1))])
    assert too_many.error.message == "model 'twice': the request has 5 rows, max_batch_size is 4"
    assert too_many.error.code == TritonError.INVALID_ARG
    assert good.error is None


# --- session options


def parameters(**values: str) -> dict:
    return {"name": "m", "parameters": {key: {"string_value": v} for key, v in values.items()}}


def test_unset_threads_share_the_cores_out_over_the_instances(backend, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)

    def bound(*groups: dict) -> int:
        config = {"name": "m", "instance_group": list(groups)}
        return backend.session_options(config).intra_op_num_threads

    assert bound({"count": 1}) == 12
    assert bound({"count": 2}, {"count": 1, "gpus": [0, 1]}) == 3
    assert bound({"count": 100}) == 1


def test_parameters_reach_the_session(backend):
    config = parameters(
        intra_op_thread_count="3",
        inter_op_thread_count="2",
        execution_mode="1",
        enable_mem_arena="0",
        enable_mem_pattern="False",
    )
    options = backend.session_options(config)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
    assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert not options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern
    config = parameters(**{"memory.enable_memory_arena_shrinkage": "cpu:0"})
    entry = backend.run_options(config).get_run_config_entry("memory.enable_memory_arena_shrinkage")
    assert entry == "cpu:0"


@pytest.mark.parametrize(
    ("level", "expected"),
    [(None, "ENABLE_ALL"), (-1, "ENABLE_BASIC"), (1, "ENABLE_EXTENDED"), (2, "DISABLE_ALL")],
)
def test_graph_level(backend, level, expected):
    config = {"name": "m", "optimization": {} if level is None else {"graph": {"level": level}}}
    options = backend.session_options(config)
    assert options.graph_optimization_level.name == f"ORT_{expected}"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("intra_op_thread_count", "many", "a whole number"),
        ("execution_mode", "2", "one of 0, 1"),
        ("enable_mem_arena", "yes", "one of 1, true, 0, false"),
    ],
)
def test_bad_parameter_is_refused(backend, key, value, expected):
    message = f"model 'm': parameter {key} is '{value}', expected {expected}"
    with pytest.raises(TritonModelException, match=message):
        backend.session_options(parameters(**{key: value}))


# --- execution providers


def accelerated(side: str, *accelerators: dict) -> dict:
    chosen = {f"{side}_execution_accelerator": list(accelerators)}
    return {"name": "m", "optimization": {"execution_accelerators": chosen}}


def test_gpu_without_the_gpu_wheel_is_refused(backend, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        TritonModelException, match=r"pip install onnxruntime-gpu .* or use KIND_CPU"
    ):
        backend.providers({"name": "m"}, "GPU", "0")


def test_gpu_providers_take_device_and_options(backend, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(backend.WHEELS))
    tensorrt = {
        "precision_mode": "FP16",
        "max_workspace_size_bytes": "9",
        "trt_engine_cache_enable": "1",
        "trt_dla_core": "1",
    }
    config = accelerated(
        "gpu",
        {"name": "cuda", "parameters": {"cudnn_conv_use_max_workspace": "0"}},
        {"name": "tensorrt", "parameters": tensorrt},
    )
    assert backend.providers(config, "GPU", "1") == [
        (
            "TensorrtExecutionProvider",
            {
                "trt_fp16_enable": "True",
                "trt_max_workspace_size": "9",
                "trt_engine_cache_enable": "True",
                "trt_dla_core": "1",
                "device_id": "1",
            },
        ),
        ("CUDAExecutionProvider", {"cudnn_conv_use_max_workspace": "0", "device_id": "1"}),
        ("CPUExecutionProvider", {}),
    ]
    assert backend.providers(config, "CPU", "0") == [("CPUExecutionProvider", {})]


@pytest.mark.parametrize(
    ("side", "accelerator", "fault"),
    [
        (
            "cpu",
            {"name": "tensorrt"},
            "unknown execution accelerator 'tensorrt', expected openvino",
        ),
        ("gpu", {"name": "openvino"}, "expected tensorrt or cuda"),
        ("gpu", {"name": "tensorrt", "parameters": {"fp16": "1"}}, "parameter fp16: '1'"),
        ("gpu", {"name": "tensorrt", "parameters": {"precision_mode": "FP8"}}, "FP8"),
    ],
)
def test_unknown_accelerators_are_refused(backend, side, accelerator, fault):
    with pytest.raises(TritonModelException, match=fault):
        backend.providers(accelerated(side, accelerator), "GPU", "0")


def test_openvino_counts_for_instances_on_a_cpu(backend, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(backend.WHEELS))
    config = accelerated("cpu", {"name": "openvino"})
    assert backend.providers(config, "CPU", "0") == [("OpenVINO", {})]
    assert [name for name, _ in backend.providers(config, "GPU", "0")] == [
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]


def test_openvino_without_its_wheel_is_refused(backend, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "panotriton.server.openvino_graph", raising=False)
    monkeypatch.delattr(panotriton.server, "openvino_graph", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TritonModelException, match="needs openvino: pip install openvino, or"):
        backend.open_openvino({"name": "m"}, tmp_path / "model.onnx", 1)


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_bf16_is_left_to_cpus_that_have_it(backend, monkeypatch, tmp_path, native, expected):
    asked, told = {}, []
    monkeypatch.setattr(openvino_graph, "has_bf16", lambda: native)
    monkeypatch.setattr(openvino_graph, "OpenVINOGraph", lambda path, **how: asked.update(how))
    logger = SimpleNamespace(log_warn=told.append)
    monkeypatch.setattr(backend.pb_utils, "Logger", logger, raising=False)
    backend.open_openvino(parameters(openvino_precision="bf16"), tmp_path / "model.onnx", 3)
    assert asked == {"threads": 3, "precision": expected}
    assert told == ([] if native else ["m: fp32, since this CPU has no bfloat16"])


def test_a_provider_that_did_not_start_is_refused(backend, monkeypatch, tmp_path):
    asked = {}

    def open_on_cpu(path, options, **arguments):
        asked.update(arguments)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", open_on_cpu)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    wanted = [("CUDAExecutionProvider", {"device_id": "0"}), ("CPUExecutionProvider", {})]
    with pytest.raises(TritonModelException, match="CUDAExecutionProvider did not start"):
        backend.open_session({"name": "m"}, tmp_path, None, wanted)
    assert asked == {"providers": wanted, "enable_fallback": 0}


# --- config.pbtxt against the graph


class Graph:
    """What a session says of a graph: x (free, 3) fp32 → y (free, 5) int64."""

    inputs: ClassVar = [SimpleNamespace(name="x", type="tensor(float)", shape=["batch", 3])]
    outputs: ClassVar = [SimpleNamespace(name="y", type="tensor(int64)", shape=[None, 5])]

    def get_inputs(self):
        return self.inputs

    def get_outputs(self):
        return self.outputs

    def get_overridable_initializers(self):
        return []


def config(x=(3,), y=(5,), max_batch_size=2, **changes) -> dict:
    return {
        "name": "m",
        "max_batch_size": max_batch_size,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": list(x)}],
        "output": [{"name": "y", "data_type": "TYPE_INT64", "dims": list(y)}],
        **changes,
    }


@pytest.mark.parametrize(
    "accepted",
    [
        config(),
        config(max_batch_size=0, x=[7, 3], y=[-1, 5]),
        config(input=[{**config()["input"][0], "dims": [1, 3], "reshape": {"shape": [3]}}]),
    ],
)
def test_what_fits_is_accepted(backend, accepted):
    assert backend.check(accepted, Graph()) == (set(), {})


@pytest.mark.parametrize(
    ("refused", "fault"),
    [
        (config(x=[4]), r"input 'x' is \[-1, 4\] .* but \[-1, 3\] in the graph; write dims: \[3\]"),
        (config(x=[-1]), "input 'x'"),
        (config(max_batch_size=0, x=[7, 3], y=[7, 5]), "output 'y'"),
        (config(y=[5, 1]), "output 'y'"),
        (config(input=[]), r"must give are \[\] in config.pbtxt but \['x'\] in the graph"),
        (config(output=[{"name": "z"}]), r"output 'z' is not in the graph, which has \['y'\]"),
        (config(input=[{**config()["input"][0], "optional": True}]), "needs max_batch_size: 0"),
    ],
)
def test_what_does_not_fit_is_refused(backend, refused, fault):
    with pytest.raises(TritonModelException, match=fault):
        backend.check(refused, Graph())


def test_a_fixed_batch_dimension_is_refused(backend):
    fixed = Graph()
    fixed.inputs = [SimpleNamespace(name="x", type="tensor(float)", shape=[1, 3])]
    with pytest.raises(TritonModelException, match=r"'x' is \[1, 3\] in the graph.*dynamic batch"):
        backend.check(config(), fixed)
    with pytest.raises(TritonModelException, match="a first dimension is fixed"):
        backend.complete(config(input=[]), fixed)


def test_an_input_with_a_default_must_be_optional(backend):
    graph = Graph()
    graph.get_overridable_initializers = lambda: [
        SimpleNamespace(name="scale", type="tensor(float)", shape=[1])
    ]
    scale = {"name": "scale", "data_type": "TYPE_FP32", "dims": [1]}
    x = {**config()["input"][0], "dims": [-1, 3]}
    fits = config(max_batch_size=0, y=[-1, 5], input=[x, {**scale, "optional": True}])
    assert backend.check(fits, graph) == (set(), {})
    with pytest.raises(TritonModelException, match="must be, optional: true"):
        backend.check({**fits, "input": [x, scale]}, graph)


@pytest.mark.parametrize("kind", ["tensor(bfloat16)", "seq(tensor(float))"])
def test_types_that_cannot_be_passed_are_refused(backend, kind):
    graph = Graph()
    graph.inputs = [SimpleNamespace(name="x", type=kind, shape=["batch", 3])]
    with pytest.raises(
        TritonModelException, match=r"'x' is .* in the graph, export as tensor\(bool"
    ):
        backend.check(config(), graph)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("sequence_batching", {"sequence_batching": {}}),
        ("batch_input", {"batch_input": [{}]}),
        ("batch_output", {"batch_output": [{}]}),
        ("decoupled", {"decoupled": True}),
        ("allow_ragged_batch", {"input": [{"allow_ragged_batch": True}]}),
        ("FORCE_CPU_ONLY_INPUT_TENSORS", parameters(FORCE_CPU_ONLY_INPUT_TENSORS="no")),
        ("gpu_mem_limit", parameters(gpu_mem_limit="1")),
    ],
)
def test_what_would_be_ignored_is_refused(backend, field, change):
    assert backend.unsupported(config(), "GPU") == []
    (named,) = backend.unsupported(config(**change), "GPU")
    assert field in named
