"""The Python `onnxruntime` backend inside a real tritonserver, on graphs of a few nodes."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from panotriton.errors import ServerStartError
from panotriton.server.launch import LocalServer
from tests.brief import BriefServer
from tests.server import graphs
from tests.server.graphs import save, tensor

ONE = "instance_group [{ kind: KIND_CPU count: 1 }]"
JOIN = "dynamic_batching { max_queue_delay_microseconds: 300000 }"
AFFINE = f"""max_batch_size: 8
input [{tensor("x", "FP32", "[3]")}]
output [{tensor("plus", "FP32", "[3]")}, {tensor("double", "FP32", "[3]")}]"""

OPENVINO = """optimization { execution_accelerators {
    cpu_execution_accelerator [ { name: "openvino" } ] } }"""
OPENVINO_PRECISION = 'parameters { key: "openvino_precision" value: { string_value: "%s" } }'


def threads(count: int) -> str:
    return f'parameters {{ key: "intra_op_thread_count" value: {{ string_value: "{count}" }} }}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """All the good models in one server."""
    repository = tmp_path_factory.mktemp("good")
    _write_batching_models(repository)
    _write_other_models(repository)
    with BriefServer(repository, auto_complete=True) as running:
        yield running


def _write_batching_models(repository: Path) -> None:
    save(repository, "affine", graphs.affine(), f"{AFFINE}\n{ONE}\n{JOIN}\n{threads(1)}")
    save(repository, "by_openvino", graphs.affine(), f"{AFFINE}\n{ONE}\n{JOIN}\n{OPENVINO}")
    save(
        repository,
        "look_up",
        graphs.look_up(),
        f"""max_batch_size: 4
        input [{tensor("index", "INT64", "[1]")}] output [{tensor("row", "FP32", "[1, 2]")}]
        {ONE} {JOIN}""",
    )
    save(
        repository,
        "images",
        graphs.unary("Abs", ["b", 3, "h", "w"], TensorProto.FLOAT16),
        f"""max_batch_size: 4
        input [{tensor("x", "FP16", "[3, -1, -1]")}] output [{tensor("y", "FP16", "[3, -1, -1]")}]
        {ONE} {JOIN}""",
    )
    save(
        repository,
        "strings",
        graphs.concat_strings(),
        f"""max_batch_size: 4
        input [{tensor("left", "STRING", "[-1]")}, {tensor("right", "STRING", "[-1]")}]
        output [{tensor("both", "STRING", "[-1]")}] {ONE} {JOIN}""",
    )
    save(
        repository,
        "two_instances",
        graphs.affine(),
        f"""{AFFINE} instance_group [{{ kind: KIND_CPU count: 2 }}] {threads(4)}
        model_warmup [{{ name: "zeros" batch_size: 2
          inputs {{ key: "x" value: {{ data_type: TYPE_FP32 dims: [3] zero_data: true }} }} }}]""",
    )
    save(
        repository,
        "not_batchable",
        graphs.non_zero(),
        f"""max_batch_size: 8 {ONE}
        input [{tensor("x", "FP32", "[2]")}] output [{tensor("where", "INT64", "[2]")}]""",
    )


def _write_other_models(repository: Path) -> None:
    types = graphs.ALL_TYPES
    save(
        repository,
        "every_type",
        graphs.every_type(),
        f"""input [{", ".join(tensor(f"in_{name}", name, "[-1]") for name in types)}]
        output [{", ".join(tensor(f"out_{name}", name, "[-1]") for name in types)}] {ONE}""",
    )
    save(
        repository,
        "scalars",
        graphs.with_scalars(),
        f"""input [{tensor("x", "FP32", "[-1]")}, {tensor("factor", "FP32", "[1]")}]
        output [{tensor("scaled", "FP32", "[-1]")}, {tensor("total", "FP32", "[1]")}] {ONE}""",
    )
    save(
        repository,
        "with_default",
        graphs.with_default(),
        f"""input [{tensor("x", "FP32", "[2]")},
                   {tensor("offset", "FP32", "[2]", "optional: true")}]
        output [{tensor("y", "FP32", "[2]")}] {ONE}""",
    )
    graphs.external(
        repository,
        "external",
        f"""max_batch_size: 2 default_model_filename: "model.onnx" {ONE}
        input [{tensor("x", "FP32", "[64]")}] output [{tensor("y", "FP32", "[64]")}]""",
    )
    save(repository, "completed", graphs.affine(), None)
    save(repository, "completed_fixed", graphs.unary("Neg", [5, 2]), ONE)
    save(repository, "completed_rows", graphs.unary("Neg", ["b"]), ONE)


@pytest.fixture
def client(server: LocalServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.grpc_url) as connected:
        yield connected


def infer(client, model: str, outputs: list[str] | None = None, **arrays: np.ndarray) -> dict:
    """Outputs by name; `outputs` None asks for none by name, which means all."""
    inputs = []
    for name, array in arrays.items():
        inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    wanted = [triton.InferRequestedOutput(name) for name in outputs or []] or None
    result = client.infer(model, inputs, outputs=wanted, client_timeout=20)
    return {out.name: result.as_numpy(out.name) for out in result.get_response().outputs}


def together(client, model: str, requests: list[dict]) -> list:
    """Send requests at once; each one's outputs, or the exception that it got."""

    def send(arrays: dict):
        try:
            return infer(client, model, **arrays)
        except InferenceServerException as error:
            return error

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(send, requests))


def counts(client, model: str) -> tuple[int, int]:
    """(rows inferred, runs of the backend) so far."""
    stats = client.get_inference_statistics(model, as_json=True)["model_stats"][0]
    return int(stats.get("inference_count", 0)), int(stats.get("execution_count", 0))


def runs_for(client, model: str, before: tuple[int, int], inferred: int) -> int:
    """Runs since `before` that inferred that many rows; counted only after their responses left."""
    deadline = time.monotonic() + 10
    while (now := counts(client, model))[0] < before[0] + inferred:
        assert time.monotonic() < deadline, f"{now} after {before}, expected {inferred} rows more"
        time.sleep(0.02)
    assert now[0] == before[0] + inferred
    return now[1] - before[1]


def rows(first: float, count: int) -> np.ndarray:
    return np.float32(first) + np.arange(count * 3, dtype=np.float32).reshape(count, 3)


# --- values


def test_round_trip(client):
    x = rows(0, 5)
    out = infer(client, "affine", x=x)
    np.testing.assert_array_equal(out["plus"], 2 * x + 1)
    np.testing.assert_array_equal(out["double"], 2 * x)


def test_only_requested_outputs_come_back(client):
    assert infer(client, "affine", ["double"], x=rows(0, 1)).keys() == {"double"}


def test_every_numeric_type(client):
    values = {
        f"in_{name}": np.array([0, 1, 100], dtype) for name, (_, dtype) in graphs.ALL_TYPES.items()
    }
    out = infer(client, "every_type", **values)
    for name, (_, dtype) in graphs.ALL_TYPES.items():
        assert out[f"out_{name}"].dtype == dtype
        np.testing.assert_array_equal(out[f"out_{name}"], values[f"in_{name}"])


def test_strings(client):
    left = np.array([["a", "é日", ""]], np.object_)
    out = infer(client, "strings", left=left, right=left[:, ::-1].copy())
    assert [text.decode() for text in out["both"].ravel()] == ["a", "é日é日", "a"]


def test_strings_that_are_not_utf8_are_the_callers_error(client):
    bad = np.array([[b"\xff\xfe"]], np.object_)
    with pytest.raises(InferenceServerException, match="input 'right' must be UTF-8") as caught:
        infer(client, "strings", left=np.array([["a"]], np.object_), right=bad)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_dynamic_shapes_in_half_precision(client):
    for height, width in ((2, 3), (5, 1)):
        x = -np.random.default_rng(0).random((2, 3, height, width)).astype(np.float16)
        y = infer(client, "images", x=x)["y"]
        assert y.dtype == np.float16
        np.testing.assert_array_equal(y, -x)


def test_zero_sized_tensors(client):
    assert infer(client, "images", x=np.zeros((1, 3, 0, 4), np.float16))["y"].shape == (1, 3, 0, 4)
    empty = np.zeros((1, 0), np.object_)
    assert infer(client, "strings", left=empty, right=empty)["both"].shape == (1, 0)


def test_scalars_are_written_as_one(client):
    out = infer(client, "scalars", x=np.array([1, 2], np.float32), factor=np.array([3], np.float32))
    np.testing.assert_array_equal(out["scaled"], [3, 6])
    np.testing.assert_array_equal(out["total"], [9])  # (1,)


def test_optional_input_may_be_left_out(client):
    x = np.ones(2, np.float32)
    np.testing.assert_array_equal(infer(client, "with_default", x=x)["y"], [101, 101])
    np.testing.assert_array_equal(infer(client, "with_default", x=x, offset=x)["y"], [2, 2])


def test_external_data(client):
    x = np.arange(64, dtype=np.float32)[None]
    np.testing.assert_array_equal(infer(client, "external", x=x)["y"], 3 * x)


# --- batching


def test_concurrent_requests_are_joined_and_split(client):
    before = counts(client, "affine")
    sent = [rows(10 * i, 1 + i % 2) for i in range(10)]  # 15 rows, max_batch_size 8
    answers = together(client, "affine", [{"x": x} for x in sent])
    for x, out in zip(sent, answers, strict=True):
        np.testing.assert_array_equal(out["plus"], 2 * x + 1)
        np.testing.assert_array_equal(out["double"], 2 * x)
    assert runs_for(client, "affine", before, 15) < 10


def test_strings_are_joined_and_split(client):
    sent = [np.array([[f"{i}"], ["x"]], np.object_) for i in range(2)]
    answers = together(client, "strings", [{"left": text, "right": text} for text in sent])
    assert [out["both"].ravel().tolist() for out in answers] == [[b"00", b"xx"], [b"11", b"xx"]]


def test_requests_of_other_shapes_at_once(client):
    sent = [np.full((1, 3, 1 + i % 2, 2), -i, np.float16) for i in range(4)]
    for x, out in zip(sent, together(client, "images", [{"x": x} for x in sent]), strict=True):
        np.testing.assert_array_equal(out["y"], -x)


def test_bad_request_fails_alone_in_its_batch(client):
    before = counts(client, "look_up")
    sent = [np.array([[index]], np.int64) for index in (0, 99, 2, 3)]
    good_0, bad, good_2, good_3 = together(client, "look_up", [{"index": i} for i in sent])
    for index, out in ((0, good_0), (2, good_2), (3, good_3)):
        np.testing.assert_array_equal(out["row"], np.full((1, 1, 2), 10 * index))
    assert isinstance(bad, InferenceServerException)
    assert "model 'look_up'" in bad.message()
    assert "indices element out of data bounds, idx=99" in bad.message()
    assert "\n" not in bad.message()
    assert runs_for(client, "look_up", before, 4) == 1, "the four did not share one batch"
    after = infer(client, "look_up", index=np.array([[1]], np.int64))
    np.testing.assert_array_equal(after["row"], [[[10, 10]]])


def test_output_rows_that_do_not_match_the_input_are_an_error(client):
    x = np.array([[1, 0], [1, 1]], np.float32)
    with pytest.raises(InferenceServerException, match=r"'where' has 3 rows for 2 rows of input"):
        infer(client, "not_batchable", x=x)


# --- instances


def test_two_instances_warm_up_and_answer(client):
    assert counts(client, "two_instances") == (4, 2)  # 2 rows of warm-up in each instance
    sent = [rows(first, 2) for first in range(4)]
    answers = together(client, "two_instances", [{"x": x} for x in sent])
    for x, out in zip(sent, answers, strict=True):
        np.testing.assert_array_equal(out["double"], 2 * x)


def test_intra_op_thread_count_bounds_each_instance(server):
    one = thread_count(server, "affine_0_0")  # the stub's own threads; a run uses the caller's
    assert [thread_count(server, f"two_instances_0_{i}") for i in range(2)] == [one + 3] * 2


def thread_count(server: LocalServer, instance: str) -> int:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue  # it ended meanwhile
        if parent == server.pid and instance.encode() in words:
            return len(list((process / "task").iterdir()))
    raise AssertionError(f"no process for {instance}")


# --- config.pbtxt from the graph


def config_of(server: LocalServer, model: str) -> dict:
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{model}/config") as answer:
        return json.load(answer)


def test_no_config_at_all(client, server):
    config = config_of(server, "completed")
    assert config["max_batch_size"] == 4
    assert "dynamic_batching" in config
    assert [(each["name"], each["data_type"], each["dims"]) for each in config["output"]] == [
        ("double", "TYPE_FP32", [3]),
        ("plus", "TYPE_FP32", [3]),
    ]
    np.testing.assert_array_equal(
        infer(client, "completed", x=rows(0, 2))["double"], 2 * rows(0, 2)
    )


def test_completed_without_batching(client, server):
    config = config_of(server, "completed_fixed")
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (0, [5, 2])
    x = np.ones((5, 2), np.float32)
    np.testing.assert_array_equal(infer(client, "completed_fixed", x=x)["y"], -x)


def test_completed_with_nothing_but_a_batch_dimension(client, server):
    entry = config_of(server, "completed_rows")["input"][0]
    assert (entry["dims"], entry["reshape"]) == ([1], {"shape": []})
    x = np.ones((3, 1), np.float32)
    np.testing.assert_array_equal(infer(client, "completed_rows", x=x)["y"], -x)


# --- OpenVINO in onnxruntime's place


def test_openvino_gives_what_onnxruntime_gives(client, server):
    """In batches too, of more shapes than are kept compiled."""
    asked = [rows(0, count) for count in (1, 5, 8, 2, 3, 1)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda x: infer(client, "by_openvino", x=x), asked))
    for x, answer in zip(asked, answers, strict=True):
        for name, expected in infer(client, "affine", x=x).items():
            np.testing.assert_array_equal(answer[name], expected)


# --- refusals at load


def test_every_broken_model_names_its_fault(tmp_path):
    expected = _write_broken_models(tmp_path)
    with pytest.raises(ServerStartError) as caught:
        BriefServer(tmp_path, auto_complete=True).__enter__()
    lines = str(caught.value).splitlines()
    for model, fault in expected.items():
        reasons = [line for line in lines if f"unable to load model '{model}'" in line]
        assert len(reasons) == 1, f"{model}: {lines}"
        assert fault in reasons[0]


def _write_broken_models(repository: Path) -> dict[str, str]:
    """Each model's name with what its error must say."""
    accelerate = (
        'optimization { execution_accelerators { cpu_execution_accelerator [{ name: "%s" }] } }'
    )
    configs = {
        "wrong_type": (
            AFFINE.replace('"x" data_type: TYPE_FP32', '"x" data_type: TYPE_FP16'),
            "input 'x' is TYPE_FP16 in config.pbtxt but TYPE_FP32 in the graph",
        ),
        "wrong_name": (
            AFFINE.replace('"plus"', '"minus"'),
            "output 'minus' is not in the graph, which has ['double', 'plus']",
        ),
        "wrong_rank": (
            AFFINE.replace("[3]", "[3, 1]", 1),
            "input 'x' is [-1, 3, 1] in config.pbtxt (batch first) but [-1, 3] in the graph; "
            "write dims: [3]",
        ),
        "openvino": (
            f"{AFFINE} {accelerate % 'openvino'} {OPENVINO_PRECISION % 'fp8'}",
            "parameter openvino_precision is 'fp8', expected one of fp32, bf16",
        ),
        "openvino_unfit": (
            f"{AFFINE.replace('[3]', '[4]')} {accelerate % 'openvino'}",
            "input 'x' is [-1, 4] in config.pbtxt (batch first) but [-1, 3] in the graph",
        ),
        "other": (f"{AFFINE} {accelerate % 'xnn'}", "unknown execution accelerator 'xnn'"),
    }
    for name, (config, _) in configs.items():
        save(repository, name, graphs.affine(), f"{config} {ONE}")
    expected = {name: fault for name, (_, fault) in configs.items()}
    truncated = save(repository, "truncated", graphs.affine(), f"{AFFINE} {ONE}")
    truncated.write_bytes(truncated.read_bytes()[:-20])
    expected["truncated"] = "Protobuf parsing failed"
    save(repository, "no_file", graphs.affine(), f"{AFFINE} {ONE}").rename(
        repository / "no_file/1/other.onnx"
    )
    expected["no_file"] = "no_file/1/model.onnx is missing"
    graphs.external(repository, "no_weights", f"{ONE}").unlink()
    expected["no_weights"] = "weights.bin"
    return expected
