"""quantize_hqq: grids by half-quadratic splitting of an l_p norm of the errors, p < 1. No data, seconds.

HQQ (solvers/hqq.py) moves the zero-point of every group. Its zero-points are real numbers; ours are stored
as codes, and rounding loses nearly all of that gain. So, from the min-max grid, two steps alternate:
zero-points, rounded to codes, and scales for them by the same splitting; a group keeps what lowers its l_p
error. A symmetric grid has the second step only. Embedding and head are rounded plainly.

A lower l_p error of the weights is not a lower error of the outputs: the clip search of `quantize_round`
costs as little and is often as good; with calibration text `quantize_gptq` is far better.
"""

from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.formats import AffineFormat, AnyFormat, Format, Grid, Int4, QuantizedTensor
from compress.formats.base import float16_exact
from compress.formats.registry import TABLES, beside
from compress.formats.swap import embedding_names
from compress.layerwise.plain import quantize_one_by_one
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Pass
from compress.solvers.hqq import HalfQuadratic, fit_scales, lp_error, zero_points
from compress.tasks.base import Task
from compress.tasks.registry import TASKS

_ROWS = 4096  # fitted at a time, so that scratch memory does not grow with the layer
_ROUNDS = 2


class QuantizeHQQ(Pass):
    """Half-quadratic quantization on grids with integer zero-points."""

    kind: ClassVar[Kind] = "quantize"
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    streams: ClassVar[bool] = True
    tasks: ClassVar[frozenset[Task]] = TASKS

    format: AnyFormat = Field(Int4(), description="of the linear layers")
    embeddings: AnyFormat | None = Field(default_factory=beside, description=TABLES)
    p: float = Field(0.7, gt=0, le=1, description="of the norm of the errors; smaller ignores outliers more")
    beta: float = Field(10.0, gt=0, description="first weight of the splitting")
    kappa: float = Field(1.01, ge=1, le=2, description="growth of that weight per iteration")
    iterations: int = Field(20, ge=1, le=200, description="of each half step")
    select: tuple[str, ...] = Field(
        ("*",), min_length=1, description="wildcards of the linear layers to take"
    )
    skip: tuple[str, ...] = Field((), description="wildcards of those to leave float")

    @field_validator("format")
    @classmethod
    def _has_a_grid(cls, format: Format) -> Format:
        if not isinstance(format, AffineFormat):
            raise ValueError(
                f"{format.kind} {format.fixed}, so there is no grid to fit; use int4, or quantize_gptq"
            )
        return format

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers, then embedding and head."""
        linears = linear_layers(model, self.select, self.skip)
        return linears + (embedding_names(model) if self.embeddings and linears else [])

    def writes(self) -> tuple[Format, ...]:
        """The two formats."""
        return (self.format,) if self.embeddings is None else (self.format, self.embeddings)

    def grid(self, weight: Tensor) -> Grid:
        """The grid of a matrix (out, in), float32; no group's l_p error is above min-max's."""
        parts = [self._grid_of_rows(rows) for rows in weight.split(_ROWS)]
        return Grid(torch.cat([p.scales for p in parts]), torch.cat([p.zeros for p in parts]))

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Quantize; weights that were pruned stay zero."""
        names = linear_layers(bundle.model, self.select, self.skip)
        what = f"{self.name()} {self.format.kind}"
        result = quantize_one_by_one(bundle, context, names, self._quantized, self.embeddings, what)
        return result.evolve(notes={"format": self.format.model_dump(), "layers": len(names)})

    def _quantized(self, weight: Tensor) -> QuantizedTensor:
        grid = self.grid(weight)
        return QuantizedTensor.from_codes(self.format, self.format.codes(weight, grid), grid)

    def _grid_of_rows(self, weight: Tensor) -> Grid:
        start = self.format.model_copy(update={"clip_search": 0}).fit(weight)
        width = self.format.group_width(weight.shape[1])
        whole = weight.shape[1] // width  # groups of full width; one shorter may follow
        cut = whole * width
        parts = [self._improve(weight[:, :cut].unflatten(1, (whole, width)), start, slice(whole))]
        if cut < weight.shape[1]:
            parts.append(self._improve(weight[:, None, cut:], start, slice(whole, None)))
        scales, zeros = zip(*parts, strict=True)
        return Grid(torch.cat(scales, 1), torch.cat(zeros, 1).to(torch.uint8))

    def _improve(self, groups: Tensor, start: Grid, part: slice) -> tuple[Tensor, Tensor]:
        """Scales and zero-points of groups (out, n, width) that are the `part` of the start's."""
        settings = HalfQuadratic(self.p, self.beta, self.kappa, self.iterations)
        top = self.format.levels - 1
        scales, zeros = start.scales[:, part], start.zeros[:, part].float()

        def codes(steps: Tensor) -> Tensor:
            return steps.round().clamp_(0, top)

        def error(zeros: Tensor) -> Tensor:
            return lp_error(groups, scales, zeros, codes, self.p)

        for _ in range(_ROUNDS):
            if not self.format.symmetric:
                tried = codes(zero_points(groups, scales, zeros, codes, settings))
                zeros = torch.where(error(tried) < error(zeros), tried, zeros)
            scales = fit_scales(groups, scales, zeros, codes, float16_exact, settings)
        return scales, zeros
