"""Graphs with operators that exist on GPUs alone, and how the same files run anywhere else.

`panotriton.GroupNorm` has the inputs and attributes of com.microsoft.GroupNorm, of which onnxruntime has
no other kernels than those for GPUs. `portable` puts a function into the file that says what it computes
in ONNX's own operators: so every engine runs it, and it is compared with PyTorch. (A function under
Microsoft's own name would not be used: the schema that is registered for it goes first.) `for_gpu` gives it
Microsoft's name.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx import parser

from panotriton.local import open_network
from panotriton.pipeline.scratch import atomic
from panotriton.server.engines import CPU, Graph
from panotriton_export.configs import read_config

__all__ = ["FUNCTION", "GROUP_NORM", "HERE", "for_gpu", "open_here", "portable", "rewrite_for_gpu"]

HERE, _ON_GPU = "panotriton", "com.microsoft"
GROUP_NORM = "GroupNorm"
_KIND_GPU = 1

# X (N, H, W, C), gamma and beta (C) fp32 → Y as X. Statistics are fp32, as on a GPU.
FUNCTION = """
<opset_import: ["" : 18], domain: "panotriton">
GroupNorm <epsilon, groups, activation> (X, gamma, beta) => (Y)
{
    wide = Cast <to: int = 1> (X)
    planes = Transpose <perm: ints = [0, 3, 1, 2]> (wide)
    shape = Shape (planes)
    count = Constant <value_int: int = @groups> ()
    zero = Constant <value_ints: ints = [0]> ()
    rest = Constant <value_ints: ints = [-1]> ()
    first = Unsqueeze (count, zero)
    split = Concat <axis: int = 0> (zero, first, rest)
    grouped = Reshape (planes, split)
    mean = ReduceMean (grouped, rest)
    centred = Sub (grouped, mean)
    squares = Mul (centred, centred)
    variance = ReduceMean (squares, rest)
    least = Constant <value_float: float = @epsilon> ()
    safe = Add (variance, least)
    deviation = Sqrt (safe)
    normal = Div (centred, deviation)
    whole = Reshape (normal, shape)
    last = Transpose <perm: ints = [0, 2, 3, 1]> (whole)
    scaled = Mul (last, gamma)
    moved = Add (scaled, beta)
    chosen = Constant <value_int: int = @activation> ()
    activated = Cast <to: int = 9> (chosen)
    gate = Sigmoid (moved)
    one = Constant <value_float: float = 1.0> ()
    factor = Where (activated, gate, one)
    result = Mul (moved, factor)
    Y = CastLike (result, X)
}
"""


def portable(model: ir.Model) -> bool:
    """Name the group norms so that every engine runs them, by the function; whether there are any."""
    any_there = _rename(model, HERE)
    if any_there:
        function = ir.from_proto(parser.parse_function(FUNCTION))
        model.functions[function.identifier()] = function
    return any_there


def for_gpu(model: ir.Model) -> None:
    """Name the group norms so that onnxruntime on a GPU computes them, and nothing else does."""
    _rename(model, _ON_GPU)
    for identifier in [each for each in model.functions if each[0] == HERE]:
        del model.functions[identifier]


def _rename(model: ir.Model, domain: str) -> bool:
    norms = [node for node in model.graph.all_nodes() if node.op_type == GROUP_NORM]
    norms = [node for node in norms if node.domain in (HERE, _ON_GPU)]
    for node in norms:
        node.domain = domain
    if norms:
        model.opset_imports.pop(HERE, None)
        model.opset_imports[domain] = 1
    return bool(norms)


def rewrite_for_gpu(path: Path) -> None:
    """Give the operators of a file their names on a GPU; weights beside it stay where they are."""
    model = ir.load(path)
    for_gpu(model)
    with atomic(path) as part:
        ir.save(model, part)


def open_here(model: Path) -> Graph:
    """`open_network`, also for a model that a GPU is to run: then onnxruntime on the CPU stands in."""
    if all(group.kind != _KIND_GPU for group in read_config(model).instance_group):
        return open_network(model, emulate=True)
    path = model / "1" / "model.onnx"
    twin = path.with_name(".portable.onnx")
    graph = ir.load(path)
    portable(graph)
    try:
        ir.save(graph, twin)
        return CPU.open(twin)
    finally:
        twin.unlink(missing_ok=True)
