"""Products in bfloat16 whose gradients are summed in float32, whatever the windows are divided into.

Autocast gives a linear layer's weights the gradient of all windows of a micro-batch at once, and rounds that
sum to bfloat16 before it is added up in float32: one rounding for eight windows at a time, two for four and
four. Muon makes as much of a direction that holds nothing but such rounding as of any other, so trainings
part. Here each window's own share is rounded, and all sums are float32:

    dW = sum over windows b of bf16(g_b^T x_b),    db likewise,

so that micro-batches, accumulated ones and those of several processes give the same gradient, up to the order
of a sum in float32. Cost: a pass over the weight's gradient per window. Inputs without an axis of windows
(routers of experts) are multiplied in float32. Limits: experts fused to tensors of three axes are not linear
layers, and stay with autocast.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.models.running import Precision


@contextmanager
def summed_in_float32(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Let the linear layers of a model take their gradients so while the block runs, under autocast."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward]
    layers = [m for m in layers if "forward" not in m.__dict__]  # somebody else's hook stays
    if precision != "bfloat16":
        layers = []
    for layer in layers:
        layer.forward = _Forward(layer)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Forward:
    """The forward pass of one layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight, bias, device = self.layer.weight, self.layer.bias, x.device.type
        if not (torch.is_grad_enabled() and torch.is_autocast_enabled(device)):
            return F.linear(x, weight, bias)
        half = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            result: Tensor = _Linear.apply(x.to(half), weight, bias)  # type: ignore[no-untyped-call]
        return result


class _Linear(torch.autograd.Function):
    """x (..., in) in bfloat16, W (out, in) and b (out,) in float32 -> (..., out) in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        half = weight.to(x.dtype)
        ctx.save_for_backward(x, half)
        return F.linear(x, half, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            gradient @ weight if of_x else None,
            _of_weight(gradient, x) if of_weight else None,
            gradient.flatten(0, -2).sum(0, dtype=torch.float32) if of_bias else None,
        )


def _of_weight(gradient: Tensor, x: Tensor) -> Tensor:
    """The sum of g^T x over positions, float32 (out, in); gradient (..., out), x (..., in)."""
    if x.dim() < 3:
        return gradient.float().reshape(-1, gradient.shape[-1]).T @ x.float().reshape(-1, x.shape[-1])
    total = torch.zeros(gradient.shape[-1], x.shape[-1], device=x.device)
    for own, into in zip(gradient.flatten(1, -2), x.flatten(1, -2), strict=True):  # (positions, out or in)
        total += own.T @ into
    return total
