"""What half precision makes of a network on a GPU, found out on a CPU.

onnxruntime on a CPU computes a graph of fp16 weights in fp32 from end to end: it neither rounds nor overflows
between operators. Here each operator computes in fp32 and its result is stored in fp16, which is what a GPU
does, in the time that fp32 takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from panotriton_export.graph import WEIGHTS, Component, ParityResult, compare

__all__ = ["InHalf", "compare_in_half"]

_aten = torch.ops.aten
# Of fp16 PyTorch computes these on a CPU at a hundredth of the speed; what others give it rounds by itself.
_COMPUTED_IN_FP32 = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._softmax,
        _aten.addmm,
        _aten.baddbmm,
        _aten.bmm,
        _aten.convolution,
        _aten.mm,
        _aten.native_group_norm,
        _aten.native_layer_norm,
    }
)
_SLACK = 5  # of the limits, which are for fp16 weights alone


def compare_in_half(component: Component, precision: str) -> list[ParityResult]:
    """Compare a component, before its operators are fused, with what it must give, if its weights are halves.

    Raises ExportError where that is too far off, or not finite.
    """
    if WEIGHTS[precision] != torch.float16:
        return []
    results = compare(component, InHalf(component), _SLACK)
    return [replace(each, component=f"{each.component} fp16") for each in results]


class InHalf:
    """A component's own module, run as a graph is."""

    def __init__(self, component: Component) -> None:
        self._component = component

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The named outputs."""
        inputs = (torch.from_numpy(feeds[name]) for name in self._component.traced)
        with torch.no_grad(), _StoredInHalf():
            found = self._component.module(*inputs)
        tensors = found if isinstance(found, tuple) else (found,)
        named = dict(zip(self._component.outputs, tensors, strict=True))
        return [named[name].numpy() for name in outputs]


class _StoredInHalf(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if func.overloadpacket in _COMPUTED_IN_FP32 and any(map(_is_half, tree_leaves(given))):
            args, kwargs = tree_map_only(Tensor, _widened, given)
            return tree_map_only(Tensor, _narrowed, func(*args, **kwargs))
        return func(*args, **given[1])


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float16


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if _is_half(tensor) else tensor


def _narrowed(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.dtype == torch.float32 else tensor
