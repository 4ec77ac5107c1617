"""The registry of engines: what each writes to configs, is told, and refuses; and one more in a test."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from google.protobuf import text_format
from onnx.reference import ReferenceEvaluator
from torch import nn
from tritonclient.grpc.model_config_pb2 import ModelConfig

from panotriton.cli import main
from panotriton.errors import EngineError, ExportError
from panotriton.local import open_network
from panotriton.server.engines import (
    CPU,
    CUDA,
    ENGINES,
    OPENVINO,
    TENSORRT,
    ConfigEntries,
    Engine,
    Settings,
    engine_of,
    onnxruntime,
    openvino,
    stand_in,
)
from panotriton_export.configs import find_engine, set_engine
from panotriton_export.graph import Component, Probe, export_component

ROOT = Path(__file__).parent.parent.parent
CONFIG = """\
name: "network"
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "X" data_type: TYPE_FP32 dims: [ 3 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ 2 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""


def parameters(**values: str) -> dict[str, Any]:
    return {"name": "m", "parameters": {key: {"string_value": v} for key, v in values.items()}}


def accelerated(side: str, *accelerators: dict[str, Any]) -> dict[str, Any]:
    chosen = {f"{side}_execution_accelerator": list(accelerators)}
    return {"name": "m", "optimization": {"execution_accelerators": chosen}}


# ------------------------------------------------------------------------------- one more engine


class Reference:
    """onnx's own evaluator in Python."""

    def __init__(self, path: Path) -> None:
        self._evaluator = ReferenceEvaluator(str(path))

    def run(self, outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
        return list(self._evaluator.run(outputs, feeds))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Linear(3, 2)  # OpenVINO's bf16 is for blocks

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.mid_block(X))


@torch.no_grad()
def network() -> Component:
    torch.manual_seed(0)
    module, probed = Network(), torch.randn(5, 3)
    return Component(
        "network",
        module,
        {"X": torch.randn(2, 3)},
        {"X": {0: torch.export.Dim("batch", max=8)}},
        ["Y"],
        [Probe({"X": probed}, {"Y": module(probed)})],
        {"Y": 1e-6},
    )


def test_one_value_is_all_that_an_engine_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[Settings] = []

    def open_graph(path: Path, settings: Settings) -> Reference:
        opened.append(settings)
        return Reference(path)

    entries = ConfigEntries(accelerator={"depth": "2"}, parameters={"reference_mode": "plain"})
    toy = Engine(
        name="reference",
        about="onnx's evaluator",
        wheel="onnx",
        precisions={"fp32": entries},
        opener=open_graph,
        accelerator="reference",
        batches={"network": 2},
    )
    monkeypatch.setitem(ENGINES, toy.name, toy)
    with pytest.raises(SystemExit):
        main(["export", "osediff", "--help"])
    assert "reference, onnx's evaluator" in " ".join(capsys.readouterr().out.split())

    engine, component = find_engine("reference", "fp32"), network()
    (result,) = export_component(component, tmp_path, engine, "fp32")
    assert result.passed
    model = tmp_path / "network"
    (model / "config.pbtxt").write_text(CONFIG)
    set_engine(model, engine, "fp32")
    config = text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())
    assert config.max_batch_size == 2
    assert config.instance_group[0].kind == config.instance_group[0].KIND_CPU
    (named,) = config.optimization.execution_accelerators.cpu_execution_accelerator
    assert (named.name, dict(named.parameters)) == ("reference", {"depth": "2"})
    assert config.parameters["reference_mode"].string_value == "plain"

    graph = open_network(model, threads=3)
    assert isinstance(graph, Reference)
    (probe,) = component.probes
    (got,) = graph.run(["Y"], {"X": probe.inputs["X"].numpy()})
    np.testing.assert_allclose(got, probe.expected["Y"].numpy(), atol=1e-6)
    for settings in opened:  # by the export and from the config alike
        assert settings.accelerators["reference"] == {"depth": "2"}
        assert settings.parameters["reference_mode"] == "plain"
    assert [settings.emulate for settings in opened] == [True, False]
    assert opened[1].threads == 3

    set_engine(model, CPU, "fp32")
    assert (model / "config.pbtxt").read_text() == CONFIG.replace("size: 8", "size: 2")


def test_names_are_compared_by_the_registry_alone() -> None:
    """Elsewhere an engine, a precision or onnxruntime's name for either is looked up, not tested for."""
    names = {"KIND_CPU", "KIND_GPU"}
    names |= {name for each in ENGINES.values() for name in (each.name, each.accelerator)} - {""}
    names |= {precision for each in ENGINES.values() for precision in each.precisions}
    names |= {precision.upper() for precision in names} | set(ort.get_all_providers())
    found = {
        str(path.relative_to(ROOT))
        for folder in ("client", "docs", "export", "model_repository")
        for path in (ROOT / folder).rglob("*.py")
        if names & set(_compared(ast.parse(path.read_text())))
    }
    assert {path for path in found if "/server/engines/" not in path} == {
        "client/panotriton/client/conversation.py",  # "cuda" is a kind of shared memory there
        "client/panotriton/models/qwen.py",  # "cuda" is a device of torch's there
    }


def _compared(tree: ast.AST) -> list[str]:
    sides = [
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        for part in ast.walk(side)
    ]
    return [part.value for part in sides if isinstance(part, ast.Constant) and part.value in _TEXT]


class _Text:
    def __contains__(self, value: object) -> bool:
        return isinstance(value, str)


_TEXT = _Text()


def test_no_wheel_is_imported_before_a_graph_is_opened(tmp_path: Path) -> None:
    export_component(network(), tmp_path)
    (tmp_path / "network" / "config.pbtxt").write_text(CONFIG)
    code = """
import sys
from pathlib import Path
import panotriton.cli, panotriton.local, panotriton_export.graph, panotriton_export.configs
from panotriton.server.engines import CPU, OPENVINO
def imported(): return [each for each in ("onnxruntime", "openvino") if each in sys.modules]
print(imported())
panotriton.local.open_network(Path(sys.argv[1])).run(["Y"], {"X": __import__("numpy").ones((1, 3), "f")})
print(imported())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "network")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["[]", "['onnxruntime']"]


# ------------------------------------------------------------------------------- what configs say

OPENVINO_TEXT = """
optimization { execution_accelerators { cpu_execution_accelerator [ { name: "openvino" } ] } }
"""
TENSORRT_TEXT = """
optimization { execution_accelerators { gpu_execution_accelerator [ {
  name: "tensorrt"
  parameters { key: "precision_mode" value: "FP16" }
  parameters { key: "trt_engine_cache_enable" value: "1" }
  parameters { key: "trt_engine_cache_path" value: "/var/cache/panotriton/tensorrt" }
} ] } }
"""
CUDA_TEXT = """
optimization { execution_accelerators { gpu_execution_accelerator [ {
  name: "cuda"
  parameters { key: "prefer_nhwc" value: "1" }
  parameters { key: "cudnn_conv_algo_search" value: "HEURISTIC" }
  parameters { key: "arena_extend_strategy" value: "kSameAsRequested" }
} ] } }
"""
BF16_TEXT = """
parameters { key: "openvino_precision" value { string_value: "bf16" } }
"""


@pytest.mark.parametrize(
    ("name", "precision", "kind", "added"),
    [
        ("cpu", "fp16", "CPU", ""),
        ("openvino", "fp32", "CPU", OPENVINO_TEXT),
        ("openvino", "bf16", "CPU", OPENVINO_TEXT + BF16_TEXT),
        ("cuda", "fp32", "GPU", CUDA_TEXT),
        ("tensorrt", "fp16", "GPU", TENSORRT_TEXT),
        ("tensorrt", "fp32", "GPU", TENSORRT_TEXT.replace("FP16", "FP32")),
    ],
)
def test_a_config_says_what_runs_it_and_no_more(
    tmp_path: Path, name: str, precision: str, kind: str, added: str
) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text(CONFIG)
    for engine in (*ENGINES.values(), ENGINES[name]):  # the last one counts
        for each in engine.precisions:
            set_engine(tmp_path, engine, each)
    set_engine(tmp_path, ENGINES[name], precision)
    config = CONFIG.replace("KIND_CPU", f"KIND_{kind}")
    assert path.read_text() == config.replace('"onnxruntime"', f'"{ENGINES[name].backend}"') + added


def test_a_provider_or_precision_that_is_not_there_is_named() -> None:
    with pytest.raises(ExportError, match=f"is 'x'; expected one of {', '.join(ENGINES)}"):
        find_engine("x")
    for engine in ENGINES.values():
        with pytest.raises(ExportError, match=f"'int8'; expected fp32.* for {engine.name}"):
            find_engine(engine.name, "int8")
        assert find_engine(engine.name, "fp32") is engine


# ------------------------------------------------------------------------------- what they are told


def test_unset_threads_share_the_cores_out_over_the_instances(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)

    def bound(*groups: dict) -> int:
        settings = Settings.of({"name": "m", "instance_group": list(groups)})
        return onnxruntime.session_options(settings).intra_op_num_threads

    assert bound({"count": 1}) == 12
    assert bound({"count": 2}, {"count": 1, "gpus": [0, 1]}) == 3
    assert bound({"count": 100}) == 1


def test_parameters_reach_the_session():
    config = parameters(
        intra_op_thread_count="3",
        inter_op_thread_count="2",
        execution_mode="1",
        enable_mem_arena="0",
        enable_mem_pattern="False",
    )
    options = onnxruntime.session_options(Settings.of(config))
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
    assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert not options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern
    shrinkage = "memory.enable_memory_arena_shrinkage"
    options = onnxruntime.run_options(Settings.of(parameters(**{shrinkage: "cpu:0"})))
    assert options.get_run_config_entry(shrinkage) == "cpu:0"


@pytest.mark.parametrize(
    ("level", "expected"),
    [(None, "ENABLE_ALL"), (-1, "ENABLE_BASIC"), (1, "ENABLE_EXTENDED"), (2, "DISABLE_ALL")],
)
def test_graph_level(level, expected):
    config = {"name": "m", "optimization": {} if level is None else {"graph": {"level": level}}}
    options = onnxruntime.session_options(Settings.of(config))
    assert options.graph_optimization_level.name == f"ORT_{expected}"


def test_gpu_providers_take_device_and_options():
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
    assert engine_of(config, on_gpu=True) is TENSORRT
    assert onnxruntime.tensorrt_providers(Settings.of(config, device="1")) == [
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
    assert engine_of(config) is CPU


def test_tensorrts_cache_is_made_or_named(tmp_path):
    def settings(folder):
        parameters = {"precision_mode": "FP16", "trt_engine_cache_path": str(folder)}
        config = accelerated("gpu", {"name": "tensorrt", "parameters": parameters})
        return Settings.of(config)

    cache = tmp_path / "of" / "engines"
    with pytest.raises(EngineError, match="TensorrtExecutionProvider is not in"):
        TENSORRT.opener(tmp_path / "model.onnx", settings(cache))
    assert cache.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="file/x cannot be made .Not a directory.: name another"):
        TENSORRT.opener(tmp_path / "model.onnx", settings(tmp_path / "file" / "x"))


def test_openvino_counts_for_instances_on_a_cpu():
    config = accelerated("cpu", {"name": "openvino"})
    assert engine_of(config) is OPENVINO
    assert engine_of(config, on_gpu=True) is CUDA
    assert [name for name, _ in onnxruntime.cuda_providers(Settings.of(config))] == [
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]


def test_on_a_machine_without_a_gpu_the_cpu_stands_in():
    for each in ENGINES.values():
        assert stand_in(each) is (CPU if each.on_gpu else each)


# ------------------------------------------------------------------------------- what they refuse


def gpu_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", ort.get_all_providers)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)


@pytest.mark.parametrize(
    ("side", "accelerator", "fault"),
    [
        ("cpu", {"name": "tensorrt"}, "unknown execution accelerator 'tensorrt', .* openvino"),
        ("gpu", {"name": "openvino"}, "expected .*tensorrt or cuda"),
        ("gpu", {"name": "tensorrt", "parameters": {"fp16": "1"}}, "parameter fp16: '1'"),
        ("gpu", {"name": "tensorrt", "parameters": {"precision_mode": "FP8"}}, "FP8"),
    ],
)
def test_unknown_accelerators_are_refused(monkeypatch, tmp_path, side, accelerator, fault):
    gpu_wheel(monkeypatch)
    config = accelerated(side, accelerator)
    with pytest.raises(EngineError, match=fault):
        engine_of(config, on_gpu=True).open(tmp_path / "model.onnx", Settings.of(config))


def test_a_gpu_without_the_gpu_wheel_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    with pytest.raises(EngineError, match=r"pip install onnxruntime-gpu .* or use KIND_CPU"):
        engine_of({"name": "m"}, on_gpu=True).open(tmp_path / "model.onnx")


def test_a_provider_that_did_not_start_is_refused(monkeypatch, tmp_path):
    asked = {}

    def open_on_cpu(path, options, **arguments):
        asked.update(arguments)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    gpu_wheel(monkeypatch)
    monkeypatch.setattr(ort, "InferenceSession", open_on_cpu)
    wanted = [("CUDAExecutionProvider", {"device_id": "0"}), ("CPUExecutionProvider", {})]
    with pytest.raises(EngineError, match="CUDAExecutionProvider did not start"):
        CUDA.open(tmp_path)
    assert asked == {"providers": wanted, "enable_fallback": 0}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda each: each.name)
def test_a_missing_wheel_is_named(monkeypatch, tmp_path, engine):
    for module in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        EngineError, match=f"{engine.name} needs .*: pip install {engine.wheel}, or"
    ):
        engine.open(tmp_path / "model.onnx")


def test_a_preset_without_the_wheel_is_refused_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match="needs openvino: pip install openvino, or"):
        OPENVINO.best_precision()
    assert CPU.best_precision() == "fp32"


@pytest.mark.parametrize("engine", [CPU, OPENVINO], ids=lambda each: each.name)
def test_a_file_that_is_no_graph_is_named(tmp_path, engine):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=rf"^the engine {engine.name} cannot open {path}: .+$"):
        engine.open(path)


# ------------------------------------------------------------------------------- bf16


@pytest.mark.parametrize(
    ("native", "emulate", "expected"),
    [(True, False, "bf16"), (False, False, "fp32"), (False, True, "bf16")],
)
def test_bf16_is_left_to_cpus_that_have_it(monkeypatch, tmp_path, native, emulate, expected):
    asked, told = {}, []
    monkeypatch.setattr(openvino, "has_bf16", lambda: native)
    monkeypatch.setattr(openvino, "OpenVINOGraph", lambda path, **how: asked.update(how))
    settings = OPENVINO.settings("bf16", threads=3, emulate=emulate, report=told.append)
    OPENVINO.open(tmp_path / "model.onnx", settings)
    assert asked == {"threads": 3, "precision": expected}
    fell_back = expected == "fp32"
    assert told == ["fp32, since this CPU has no bfloat16"] * fell_back
    assert OPENVINO.best_precision() == ("bf16" if native else "fp32")


def test_without_a_server_it_falls_back_too_and_says_so(monkeypatch, tmp_path, caplog):
    export_component(network(), tmp_path)
    model = tmp_path / "network"
    (model / "config.pbtxt").write_text(CONFIG)
    set_engine(model, OPENVINO, "bf16")
    monkeypatch.setattr(openvino, "has_bf16", lambda: False)
    with caplog.at_level(logging.WARNING):
        opened = open_network(model), open_network(model, emulate=True)
    said = [each.getMessage() for each in caplog.records if each.name == "panotriton.local"]
    assert said == ["network: fp32, since this CPU has no bfloat16"]
    rounds = [
        any(
            node.get_output_element_type(0).get_type_name() == "bf16"
            for node in graph._model.get_ops()
        )
        for graph in opened
    ]
    assert rounds == [False, True]


def test_onnxruntimes_own_names_go_before_the_config(tmp_path):
    export_component(network(), tmp_path)
    model = tmp_path / "network"
    (model / "config.pbtxt").write_text(CONFIG)
    set_engine(model, OPENVINO, "fp32")
    assert open_network(model).get_providers() == ["OpenVINO"]
    given = open_network(model, providers=["CPUExecutionProvider"])
    assert given.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(EngineError, match="CUDAExecutionProvider is not in the installed"):
        open_network(model, providers=["CUDAExecutionProvider"])


INTERRUPTED = """
import faulthandler, gc, signal, sys, threading
from pathlib import Path
import numpy as np
from onnx import TensorProto, helper
from panotriton.server.engines.openvino import OpenVINOGraph
faulthandler.enable()  # as pytest, Ray and many servers do: handlers run on a stack of their own
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
path = Path(sys.argv[1])
path.write_bytes(helper.make_model(graph).SerializeToString())
graphs = [OpenVINOGraph(path, threads=1)]
graphs[0].run(["y"], {"x": np.ones((1, 3), np.float32)})
def drop():
    graphs.clear()
    gc.collect()
thread = threading.Thread(target=drop)
thread.start()
thread.join()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_graph_that_another_thread_drops_leaves_signals_alone(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "model.onnx")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr
