"""Activations in eight bits: what a layer's input is rounded to before it meets the codes.

dynamic   per token, symmetric: s = max |x| / 127 of the row, q = round(x / s). No calibration. With
          `outliers`, columns in which any |x| exceeds the threshold stay as they are, which is LLM.int8
          (Dettmers et al. 2022, arXiv 2208.07339, section 3.2; threshold 6.0).
static    per tensor, with a zero-point, from the smallest and largest value seen on calibration text:
          s = (high - low) / 255, q = round(x / s) + z. Cheapest to run; fold SmoothQuant's scales before
          (arXiv 2211.10438), or a few large channels take the whole range.

The rounding is exact and the product is of floats that stand for the integers: what a runtime with an
integer kernel computes, up to the rounding of its sums. It shows the quality; the speed is a runtime's.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class Activations(BaseModel):
    """How a layer rounds its input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["dynamic", "static"] = "dynamic"
    outliers: float | None = Field(None, gt=0, description="columns that exceed it stay float (dynamic only)")


def round_dynamic(x: Tensor, outliers: float | None = None) -> Tensor:
    """x (..., in) with each row on its own symmetric grid of 255 values.

    >>> round_dynamic(torch.tensor([[127.0, 0.4, -1.6]])).tolist()
    [[127.0, 0.0, -2.0]]
    >>> round_dynamic(torch.tensor([[127.0, 0.4, -1.6]]), outliers=6.0)[0, 0].item()
    127.0
    """
    kept = None
    if outliers is not None:
        kept = (x.abs() > outliers).flatten(0, -2).any(0)  # (in,)
    rest = x if kept is None else x.masked_fill(kept, 0.0)
    steps = rest.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    rounded = torch.round(rest / steps) * steps
    return rounded if kept is None else torch.where(kept, x, rounded)


def round_static(x: Tensor, bounds: Tensor) -> Tensor:
    """x (..., in) on the grid of 256 values between `bounds` (2,), low and high; beyond them it is cut off.

    >>> round_static(torch.tensor([0.3, 7.0, 999.0]), torch.tensor([0.0, 255.0])).tolist()
    [0.0, 7.0, 255.0]
    """
    step, zero = static_grid(bounds)
    return (torch.clamp(torch.round(x / step) + zero, 0, 255) - zero) * step


def static_grid(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """The step of the grid between `bounds` (2,), and the number of steps from its lowest value to zero."""
    low, high = bounds[0].clamp(max=0.0), bounds[1].clamp(min=0.0)  # zero must be on the grid
    step = ((high - low) / 255).clamp(min=1e-12)
    return step, torch.round(-low / step)
