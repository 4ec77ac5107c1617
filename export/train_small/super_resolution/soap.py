"""The optimiser: Adam in the eigenbasis of what Shampoo would precondition with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Soap"]

_BETAS = (0.9, 0.99)
_EVERY = 10  # steps, a basis is brought up to date


class Soap(Optimizer):
    """Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024, without weight decay.

    What SiLU lets through has a mean, so the weights of one convolution pull together: Adam's steps, equal
    for each of them, sum to a shift of the picture that a network this small is long in unlearning. In the
    eigenbasis that shift is one coordinate among many.
    """

    def __init__(self, parameters: Iterable[Any], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """`closure` is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = parameter.grad.reshape(len(parameter), -1)  # (out, in · kernel)
                    change = _change(self.state[parameter], gradient)
                    parameter.add_(change.reshape(parameter.shape), alpha=-group["lr"])


def _change(state: dict[str, Any], gradient: Tensor) -> Tensor:
    """By how much to step against, at a learning rate of 1; brings the state up to date."""
    sides = {"left": gradient @ gradient.T, "right": gradient.T @ gradient}
    if not state:
        state |= {
            "step": 0,
            "mean": torch.zeros_like(gradient),
            "square": torch.zeros_like(gradient),
        }
        for side, product in sides.items():
            state[side], state[f"{side}_basis"] = product, torch.linalg.eigh(product)[1]
    state["step"] += 1
    left, right = state["left_basis"], state["right_basis"]
    state["mean"].lerp_(gradient, 1 - _BETAS[0])
    state["square"].lerp_((left.T @ gradient @ right).square(), 1 - _BETAS[1])
    mean = left.T @ state["mean"] @ right / (1 - _BETAS[0] ** state["step"])
    deviation = (state["square"] / (1 - _BETAS[1] ** state["step"])).sqrt() + 1e-10
    change = left @ (mean / deviation) @ right.T
    for side, product in sides.items():
        state[side].lerp_(product, 1 - _BETAS[1])
        if state["step"] % _EVERY == 0 or state["step"] in (2, 5):
            _refresh(state, side)
    return change


def _refresh(state: dict[str, Any], side: str) -> None:
    """One step of the power iteration; the squares move with their eigenvectors."""
    product, basis = state[side], state[f"{side}_basis"]
    order = ((product @ basis) * basis).sum(0).argsort(descending=True)
    state[f"{side}_basis"] = torch.linalg.qr(product @ basis[:, order])[0]
    state["square"] = state["square"].index_select(0 if side == "left" else 1, order)
