"""ONNX graphs of a few nodes, each written as <repository>/<name>/config.pbtxt and 1/model.onnx."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = [
    "ALL_TYPES",
    "affine",
    "concat_strings",
    "every_type",
    "external",
    "look_up",
    "non_zero",
    "save",
    "tensor",
    "unary",
    "with_default",
    "with_scalars",
]

# config.pbtxt's name of a type: ONNX's, numpy's.
ALL_TYPES = {
    "BOOL": (TensorProto.BOOL, np.bool_),
    "UINT8": (TensorProto.UINT8, np.uint8),
    "UINT16": (TensorProto.UINT16, np.uint16),
    "UINT32": (TensorProto.UINT32, np.uint32),
    "UINT64": (TensorProto.UINT64, np.uint64),
    "INT8": (TensorProto.INT8, np.int8),
    "INT16": (TensorProto.INT16, np.int16),
    "INT32": (TensorProto.INT32, np.int32),
    "INT64": (TensorProto.INT64, np.int64),
    "FP16": (TensorProto.FLOAT16, np.float16),
    "FP32": (TensorProto.FLOAT, np.float32),
    "FP64": (TensorProto.DOUBLE, np.float64),
}


def save(repository: Path, name: str, model: onnx.ModelProto, config: str | None) -> Path:
    """Write a model as Triton loads it, without a config.pbtxt where `config` is None.

    Returns the path of its model.onnx.
    """
    path = repository / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    if config is not None:
        (repository / name / "config.pbtxt").write_text(f'backend: "onnxruntime"\n{config}\n')
    return path


def tensor(name: str, data_type: str, dims: str, extra: str = "") -> str:
    """One input or output of a config.pbtxt."""
    return f'{{ name: "{name}" data_type: TYPE_{data_type} dims: {dims} {extra} }}'


def unary(operator: str, dims: list, data_type: int = TensorProto.FLOAT, out: list | None = None):
    """y = operator(x)."""
    x = helper.make_tensor_value_info("x", data_type, dims)
    y = helper.make_tensor_value_info("y", data_type, dims if out is None else out)
    return _model([helper.make_node(operator, ["x"], ["y"])], [x], [y])


def affine(data_type: int = TensorProto.FLOAT, dtype: type = np.float32):
    """(batch, 3) → double = 2·x and plus = 2·x + 1."""
    x, double, plus = (
        helper.make_tensor_value_info(name, data_type, ["batch", 3])
        for name in ("x", "double", "plus")
    )
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["double"]),
        helper.make_node("Add", ["double", "one"], ["plus"]),
    ]
    return _model(nodes, [x], [double, plus], {"two": dtype(2), "one": dtype(1)})


def look_up():
    """(batch, 1) int64 → row of a 4-row table, 10·index; an index past 3 fails the whole run."""
    index = helper.make_tensor_value_info("index", TensorProto.INT64, ["batch", 1])
    row = helper.make_tensor_value_info("row", TensorProto.FLOAT, ["batch", 1, 2])
    table = 10 * np.arange(4, dtype=np.float32)[:, None].repeat(2, 1)  # (4, 2)
    nodes = [helper.make_node("Gather", ["table", "index"], ["row"])]
    return _model(nodes, [index], [row], {"table": table})


def concat_strings():
    """left + right, both (batch, n)."""
    left, right, both = (
        helper.make_tensor_value_info(name, TensorProto.STRING, ["batch", "n"])
        for name in ("left", "right", "both")
    )
    return _model(
        [helper.make_node("StringConcat", ["left", "right"], ["both"])], [left, right], [both]
    )


def every_type():
    """One input `in_TYPE` and one equal output `out_TYPE`, each (n), of every numeric type."""
    inputs, outputs, nodes = [], [], []
    for name, (onnx_type, _) in ALL_TYPES.items():
        inputs.append(helper.make_tensor_value_info(f"in_{name}", onnx_type, ["n"]))
        outputs.append(helper.make_tensor_value_info(f"out_{name}", onnx_type, ["n"]))
        nodes.append(helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]))
    return _model(nodes, inputs, outputs)


def with_scalars():
    """x (n) and factor () → scaled (n) = x·factor and total () = Σ scaled."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    factor = helper.make_tensor_value_info("factor", TensorProto.FLOAT, [])
    scaled = helper.make_tensor_value_info("scaled", TensorProto.FLOAT, ["n"])
    total = helper.make_tensor_value_info("total", TensorProto.FLOAT, [])
    nodes = [
        helper.make_node("Mul", ["x", "factor"], ["scaled"]),
        helper.make_node("ReduceSum", ["scaled"], ["total"], keepdims=0),
    ]
    return _model(nodes, [x, factor], [scaled, total])


def with_default():
    """y (2) = x (2) + offset (2); offset may be left out and is then 100."""
    x, offset, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "offset", "y")
    )
    nodes = [helper.make_node("Add", ["x", "offset"], ["y"])]
    return _model(nodes, [x, offset], [y], {"offset": np.full(2, 100, np.float32)})


def non_zero():
    """x (batch, 2) → where (count, 2) int64: the places of the values that are not 0."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    where = helper.make_tensor_value_info("where", TensorProto.INT64, ["count", 2])
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),  # (2, count)
        helper.make_node("Transpose", ["places"], ["where"]),  # (count, 2)
    ]
    return _model(nodes, [x], [where])


def external(repository: Path, name: str, config: str) -> Path:
    """x (batch, 64) → y (batch, 64) = x · w, with w = 3·identity in 1/weights.bin.

    Returns the path of those weights.
    """
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in ("x", "y")
    )
    weights = {"w": 3 * np.eye(64, dtype=np.float32)}
    model = _model([helper.make_node("MatMul", ["x", "w"], ["y"])], [x], [y], weights)
    path = save(repository, name, model, config)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path.with_name("weights.bin")


def _model(nodes: list, inputs: list, outputs: list, constants: dict | None = None):
    initializers = [
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in (constants or {}).items()
    ]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model
