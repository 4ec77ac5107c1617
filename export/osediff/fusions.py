"""Operators that some engines compute in one go, instead of the several that PyTorch has for them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from panotriton_export.gpu_operators import GROUP_NORM
from panotriton_export.osediff.attention import fuse_attention
from panotriton_export.osediff.group_norm import fuse_group_norm

__all__ = ["fuse"]

_FUSIONS = {"MultiHeadAttention": fuse_attention, GROUP_NORM: fuse_group_norm}


def fuse(network: nn.Module, operators: Iterable[str]) -> None:
    """Make `network` export with those operators of com.microsoft; it then only serves for export."""
    for operator in operators:
        _FUSIONS[operator](network)
