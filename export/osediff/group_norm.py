"""Group norm, with the SiLU that follows it, as one operator on channels-last tensors.

As PyTorch exports it, it is four to seven operators of which none knows the channels-last layout that a GPU's
convolutions want. Here it is one, `panotriton_export.gpu_operators`, between two transpositions that
a GPU's layout pass removes.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from panotriton_export.gpu_operators import GROUP_NORM, HERE

__all__ = ["fuse_group_norm"]

# Of a group, by onnxruntime's kernel: two to a thread, 256 threads at most.
_CHANNELS = range(2, 513, 2)
_ACTIVATED = (("norm1", "nonlinearity"), ("norm2", "nonlinearity"), ("conv_norm_out", "conv_act"))


def fuse_group_norm(network: nn.Module) -> None:
    """Make every group norm of `network` export as one operator; it then only serves for export.

    Those stay as they are that a GPU's operator refuses.
    """
    for module in list(network.modules()):
        for name, activation in _ACTIVATED:
            norm, after = getattr(module, name, None), getattr(module, activation, None)
            if _is_fused(norm) and isinstance(after, (nn.SiLU, _Done)):
                setattr(module, name, _GroupNorm(norm, activated=True))
                setattr(module, activation, _Done())
    for module in list(network.modules()):
        for name, norm in list(module.named_children()):
            if _is_fused(norm):
                setattr(module, name, _GroupNorm(norm, activated=False))


def _is_fused(module: Any) -> TypeGuard[nn.GroupNorm]:
    if not isinstance(module, nn.GroupNorm):
        return False
    return module.num_channels // module.num_groups in _CHANNELS


class _Done(nn.Identity):
    """In the place of an activation that the operator before it computes."""


class _GroupNorm(nn.Module):
    """(B, C, h, w) → the same shape."""

    def __init__(self, norm: nn.GroupNorm, *, activated: bool) -> None:
        super().__init__()
        self.attributes = {
            "epsilon": float(norm.eps),
            "groups": int(norm.num_groups),
            "activation": int(activated),
            "channels_last": 1,
        }
        self.gamma = nn.Parameter(norm.weight.float(), requires_grad=False)
        self.beta = nn.Parameter(norm.bias.float(), requires_grad=False)

    def forward(self, planes: Tensor) -> Tensor:
        last = planes.permute(0, 2, 3, 1)  # (B, H, W, C)
        result = torch.onnx.ops.symbolic(
            f"{HERE}::{GROUP_NORM}",
            (last, self.gamma, self.beta),
            self.attributes,
            dtype=last.dtype,
            shape=last.shape,
            version=1,
        )
        moved: Tensor = result.permute(0, 3, 1, 2)
        return moved
