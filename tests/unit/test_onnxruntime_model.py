"""The Python `onnxruntime` backend without a server: batching, refusals, checks."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar
from unittest.mock import MagicMock

import numpy as np
import pytest

import panotriton
from panotriton.server.engines import CPU, CUDA, ENGINES
from panotriton.server.engines.shapes import FixedShapes
from tests.server import graphs

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


class Double:
    """y = 2·x; raises where a row holds a 13. Remembers the rows of each run."""

    def __init__(self):
        self.runs: list[int] = []
        self.fed: list[np.ndarray] = []

    def run(self, names, feeds):
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
    model.graph = Double()
    return model


def rows(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]  # (rows, 1)


# --- devices


def test_each_instance_opens_its_own_sessions_on_its_own_gpu(backend, monkeypatch, tmp_path):
    """Two, as the server starts them for `gpus: [ 0, 1 ]`, by an engine that writes down what it was told."""
    opened = []

    def opener(path, settings):
        opened.append((settings.device, settings.threads))
        return CPU.open(path, settings)

    monkeypatch.setitem(ENGINES, "cuda", replace(CUDA, opener=opener))
    monkeypatch.setattr(backend.pb_utils, "Logger", MagicMock(), raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    graphs.save(tmp_path, "m", graphs.affine(), None)
    fixed = {"fixed_batches": "1,4", "expected_shapes": "x 4x3"}
    tensors = {"data_type": "TYPE_FP32", "dims": [3]}
    on_both = config(
        max_batch_size=4,
        input=[{"name": "x", **tensors}],
        output=[{"name": name, **tensors} for name in ("plus", "double")],
        instance_group=[{"kind": "KIND_GPU", "count": 1, "gpus": [0, 1]}],
        parameters={name: {"string_value": value} for name, value in fixed.items()},
        default_model_filename="",
    )
    models = [backend.TritonPythonModel() for _ in range(2)]
    for device, model in enumerate(models):
        told = {
            "model_config": json.dumps(on_both),
            "model_repository": str(tmp_path / "m"),
            "model_version": "1",
            "model_instance_kind": "GPU",
            "model_instance_device_id": str(device),
            "model_instance_name": f"m_0_{device}",
        }
        model.initialize(told)
    assert opened == [("0", 4), ("1", 4)]  # the cores shared
    assert models[0].graph is not models[1].graph
    for model in models:
        (response,) = model.execute([Request(outputs=["plus"], x=np.ones((3, 3), np.float32))])
        np.testing.assert_array_equal(response.outputs["plus"], np.full((3, 3), 3))
        assert len(model.graph._sessions) == 1


# --- batching


def test_requests_of_equal_shape_share_a_run(instance):
    sent = [rows(1), rows(2, 3), rows(4)]
    responses = instance.execute([Request(x=x) for x in sent])
    assert instance.graph.runs == [4]
    for x, response in zip(sent, responses, strict=True):
        np.testing.assert_array_equal(response.outputs["y"], 2 * x)


def test_a_run_never_exceeds_max_batch_size(instance):
    instance.execute([Request(x=rows(*range(count))) for count in (3, 2, 2, 1)])
    assert instance.graph.runs == [3, 4, 1]


def test_other_shapes_run_apart_and_answers_keep_their_order(instance):
    sent = [rows(1), np.ones((1, 2), np.float32), rows(3)]
    responses = instance.execute([Request(x=x) for x in sent])
    assert instance.graph.runs == [2, 1]
    assert [r.outputs["y"].shape for r in responses] == [(1, 1), (1, 2), (1, 1)]
    assert responses[2].outputs["y"] == 6


def test_without_batching_each_request_runs_alone(instance):
    instance.max_batch_size = 0
    responses = instance.execute([Request(x=rows(1, 2)), Request(x=rows(3))])
    assert instance.graph.runs == [2, 1]
    assert responses[0].outputs["y"].shape == (2, 1)


def test_a_lone_request_is_not_copied_and_outputs_are_views(instance):
    x = rows(1, 2)
    instance.execute([Request(x=x)])
    assert instance.graph.fed[0] is x
    both = instance.execute([Request(x=rows(1)), Request(x=rows(2))])
    assert both[0].outputs["y"].base is both[1].outputs["y"].base is not None


def test_one_bad_request_fails_alone(instance):
    good, bad, last = instance.execute([Request(x=rows(value)) for value in (1, 13, 2)])
    assert (good.error, last.error) == (None, None)
    assert bad.error.message == "model 'twice': 13 is bad"
    assert bad.error.code == TritonError.INTERNAL
    assert instance.graph.runs == [3, 1, 1, 1]


def test_more_rows_than_max_batch_size_are_the_callers_error(instance):
    too_many, good = instance.execute([Request(x=rows(*range(5))), Request(x=rows(1))])
    assert too_many.error.message == "model 'twice': the request has 5 rows, max_batch_size is 4"
    assert too_many.error.code == TritonError.INVALID_ARG
    assert good.error is None


def test_batches_are_filled_up_and_the_filling_is_dropped(backend, instance):
    instance.max_batch_size = 8
    instance.shapes = FixedShapes((1, 4, 8))
    for count, fed in ((1, 1), (2, 4), (4, 4), (5, 8)):
        sent = [rows(value + 1) for value in range(count)]
        responses = instance.execute([Request(x=x) for x in sent])
        assert instance.graph.runs.pop() == fed
        assert (instance.graph.fed[-1][count:] == 0).all()
        for x, response in zip(sent, responses, strict=True):
            np.testing.assert_array_equal(response.outputs["y"], 2 * x)
    words = backend.joined([np.array([["a"]], np.object_)], 2)
    assert words.tolist() == [["a"], [""], [""]]


# --- the engine


def test_the_engine_that_the_config_names_opens_the_graph(backend, monkeypatch, tmp_path):
    told = []
    toy = replace(CPU, opener=lambda path, settings: (path, settings), accelerator="toy")
    monkeypatch.setitem(ENGINES, "toy", toy)
    logger = SimpleNamespace(log_warn=told.append)
    monkeypatch.setattr(backend.pb_utils, "Logger", logger, raising=False)
    named = {"cpu_execution_accelerator": [{"name": "toy", "parameters": {"fast": "1"}}]}
    asked = {**parameters(k="v"), "optimization": {"execution_accelerators": named}}
    (path, settings), same = backend.open_graph(asked, tmp_path, False, "3")
    assert (path, same) == (tmp_path, settings)
    assert (settings.device, settings.parameters["k"]) == ("3", "v")
    assert settings.accelerators == {"toy": {"fast": "1"}}
    settings.report("slower")
    assert told == ["m: slower"]


def test_what_an_engine_refuses_is_refused_in_one_line(backend, monkeypatch, tmp_path):
    named = {"cpu_execution_accelerator": [{"name": "openvino"}]}
    openvino = {"name": "m", "optimization": {"execution_accelerators": named}}
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no graph")
    missing = "needs {0}: pip install {0}, or"
    for name, config in {"onnxruntime": {"name": "m"}, "openvino": openvino}.items():
        with pytest.raises(
            TritonModelException, match=r"^unable .* 'm': .* cannot open .*onnx: .+$"
        ):
            backend.open_graph(config, broken, False, "0")
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            with pytest.raises(TritonModelException, match=missing.format(name)):
                backend.open_graph(config, broken, False, "0")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("intra_op_thread_count", "many", "a whole number"),
        ("execution_mode", "2", "one of 0, 1"),
        ("enable_mem_arena", "yes", "one of 1, true, 0, false"),
    ],
)
def test_bad_parameter_is_refused(backend, tmp_path, key, value, expected):
    message = f"model 'm': parameter {key} is '{value}', expected {expected}"
    with pytest.raises(TritonModelException, match=message):
        backend.open_graph(parameters(**{key: value}), tmp_path, False, "0")


def parameters(**values: str) -> dict:
    return {"name": "m", "parameters": {key: {"string_value": v} for key, v in values.items()}}


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
    assert backend.unsupported(config(), True) == []
    (named,) = backend.unsupported(config(**change), True)
    assert field in named
