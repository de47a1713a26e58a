"""Layers whose codes are frozen and whose scales learn.

A weight is w = u * s: u what a code stands for on a grid of scale one (q - z for integer grids), s the
scale of the code's group. Only s learns, so with G = dL/dW the gradient is

    dL/ds_g = sum over j in g of G_j u_j,

no rounding is differentiated and no straight-through estimator is needed (EfficientQAT, Chen et al. 2024,
arXiv 2407.11062, section 3.3, "end-to-end training of quantization parameters"). Scales are parametrised by
their relative shift, s = s_0 (1 + d): one learning rate then fits layers and formats of any size. The master
copy is float32; outside training the scales are those that will ship, rounded to float16.

Memory: one byte per weight for u, the master and Adam's states for one number per group; a layer's weight is
rebuilt in the precision of the matrix product in forward and again in backward, never kept. Autograd through
(q - z) * s would keep three float copies of every weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.formats import Grid, QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from compress.models.layers import replace_module
from compress.training.identity import digest_of


class TunableTensor(nn.Module):
    """The codes of a matrix (out, in), frozen, and the scales of its groups, learning."""

    units: Tensor
    start: Tensor

    def __init__(self, quantized: QuantizedTensor) -> None:
        super().__init__()
        self.shape = quantized.shape
        grid = quantized.grid
        width = quantized.format.group_width(self.shape[1])
        units = quantized.format.values(quantized.unpacked(), Grid(torch.ones_like(grid.scales), grid.zeros))
        if padding := grid.scales.shape[1] * width - self.shape[1]:
            units = F.pad(units, (0, padding))  # stands for 0, so it has no share in a gradient
        units = _small(units).view(self.shape[0], -1, width)
        self.register_buffer("units", units, persistent=False)  # (out, groups, width)
        self.register_buffer("start", grid.scales, persistent=False)  # (out, groups)
        self.shift = nn.Parameter(torch.zeros_like(grid.scales))

    def scales(self) -> Tensor:
        """The scales (out, groups), float32: the master's in training, the float16 ones otherwise."""
        scales = self.start * (1 + self.shift)
        return scales if self.training else shippable(scales, self.start)


def shippable(scales: Tensor, start: Tensor) -> Tensor:
    """Scales rounded to float16, as float32; `start` where float16 cannot hold a usable one.

    >>> shippable(torch.tensor([0.1, 1e-9, 1e9]), torch.tensor([0.5, 0.25, 2.0])).tolist()
    [0.0999755859375, 0.25, 2.0]
    """
    rounded = scales.detach().to(torch.float16).float()
    usable = rounded.isfinite() & (rounded != 0)
    return torch.where(usable, rounded, start)


class TunableLinear(nn.Module):
    """y = x W^T + b, as `QuantizedLinear`, with scales that learn."""

    def __init__(self, tensor: TunableTensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.tensor, self.bias = tensor, bias
        self.out_features, self.in_features = tensor.shape

    @property
    def weight(self) -> Tensor:
        """The weight as it stands; models look here for a dtype or a device."""
        return _weight(self.tensor.units, self.tensor.scales(), self.in_features, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in autocast's dtype if it is on."""
        dtype = (
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        )
        y: Tensor = _ScaledLinear.apply(x.to(dtype), self.tensor.scales(), self.tensor.units)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(dtype)


class TunableEmbedding(nn.Module):
    """A table as `QuantizedEmbedding`, with scales that learn."""

    def __init__(self, tensor: TunableTensor, scale: float) -> None:
        super().__init__()
        self.tensor, self.scale = tensor, scale
        self.num_embeddings, self.embedding_dim = tensor.shape

    @property
    def weight(self) -> Tensor:
        """The table as it stands."""
        return _weight(self.tensor.units, self.tensor.scales(), self.embedding_dim, torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up: (...) -> (..., in)."""
        rows = self.tensor.units[ids] * self.tensor.scales()[ids][..., None]  # (..., groups, width)
        rows = rows.flatten(-2)[..., : self.embedding_dim]
        return rows * self.scale if self.scale != 1.0 else rows


class _ScaledLinear(torch.autograd.Function):
    """x (..., in), scales (out, groups), units (out, groups, width) -> (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, units: Tensor) -> Tensor:
        ctx.save_for_backward(x, scales, units)
        return F.linear(x, _weight(units, scales, x.shape[-1], x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, scales, units = ctx.saved_tensors
        (y,) = grads
        columns = x.shape[-1]
        d_x = d_scales = None
        if ctx.needs_input_grad[0]:
            d_x = y @ _weight(units, scales, columns, x.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = y.flatten(0, -2).T @ x.flatten(0, -2)  # (out, in)
            d_weight = F.pad(d_weight, (0, units.shape[1] * units.shape[2] - columns))
            d_scales = (d_weight.view(units.shape) * units).sum(2, dtype=torch.float32)
        return d_x, d_scales, None


def _weight(units: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """u * s, rounded to `dtype` once: (out, in)."""
    # a float copy worked on in place: a third faster than a product of two types
    return units.float().mul_(scales.detach()[..., None]).to(dtype).flatten(1)[:, :columns]


def _small(units: Tensor) -> Tensor:
    """The same numbers in the smallest type that holds them exactly."""
    for dtype in (torch.int8, torch.int16):
        narrow = units.to(dtype)
        if torch.equal(narrow.float(), units):
            return narrow
    return units


def use_masters(model: nn.Module, masters: bool) -> None:
    """Let a model compute with its float32 master scales, or with those that would ship."""
    for module in model.modules():
        if isinstance(module, TunableTensor):
            module.train(masters)


def make_tunable(model: nn.Module) -> dict[str, tuple[QuantizedTensor, TunableTensor]]:
    """Put tunable layers in the place of those that hold codes, in place; tied ones go on sharing.

    Returns:
        name of the first layer that holds them -> (the codes, the tunable tensor).
    """
    found: dict[int, tuple[str, QuantizedTensor, TunableTensor]] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantizedLinear | QuantizedEmbedding):
            continue
        held = module.quantized
        if id(held) not in found:
            found[id(held)] = (name, held, TunableTensor(held))
        tensor = found[id(held)][2]
        new: nn.Module
        if isinstance(module, QuantizedEmbedding):
            new = TunableEmbedding(tensor, module.scale)
        else:
            new = TunableLinear(tensor, module.bias)
        replace_module(model, name, new)
    return {name: (held, tensor) for name, held, tensor in found.values()}


def digest_of_state(model: nn.Module) -> str:
    """SHA-256 over all that a model holds, codes included."""
    return digest_of(model.state_dict().items())
