"""quantize_gptq: 4-bit (or 8-bit) weights that compensate each other's rounding errors.

Per group of layers with the same input, through the layers already quantized:
    1. the target moves part of the way to what the original model computed (solvers/asymmetric.py);
    2. a grid is fitted by clip search, weighted by the inputs' second moments (formats/integer.py);
    3. GPTQ rounds column by column (solvers/gptq.py).
Embedding and head are rounded to the format `embeddings`, tied ones together. Needs calibration text.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.bundle import Bundle
from compress.calibration import Visit, walk
from compress.formats import Format, Int4, Int8, QuantizedTensor
from compress.formats.swap import embedding_names, matrix, put_codes, quantize_embeddings
from compress.passes.base import Context, Kind, Need, Pass, linear_layers
from compress.solvers.asymmetric import asymmetric_target
from compress.solvers.gptq import factorise, gptq, output_error


class QuantizeGPTQ(Pass):
    """GPTQ with static groups, falling-diagonal order and the asymmetric target."""

    kind: ClassVar[Kind] = "quantize"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    format: Format = Field(Int4(), description="of the linear layers")
    embeddings: Format | None = Field(Int8(), description="of embedding and head; null leaves them float")
    select: tuple[str, ...] = Field(
        ("*",), min_length=1, description="wildcards of the linear layers to take"
    )
    skip: tuple[str, ...] = Field((), description="wildcards of those to leave float")
    asymmetric: float = Field(
        0.5, ge=0, le=1, description="share of the way to the asymmetric target; 0: plain GPTQ"
    )
    damping: float = Field(0.01, gt=0, le=1, description="added to H, relative to its mean diagonal")
    batch: int = Field(4, ge=1, le=1024, description="calibration windows per forward pass")

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers, then embedding and head."""
        linears = linear_layers(model, self.select, self.skip)
        return linears + (embedding_names(model) if self.embeddings and linears else [])

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """About five forward passes over the calibration text, and the solver's share."""
        return (10.0 + 6.0) * parameters * calibration_tokens

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Quantize; notes tell each layer's relative output error and any damping that had to be raised."""
        result = bundle.clone()
        model = result.model.to(context.device)
        windows = torch.from_numpy(context.data.calibration.tokens).long()
        names = linear_layers(model, self.select, self.skip)
        notes: dict[str, Any] = {"format": self.format.model_dump(), "output_error": {}, "raised_damping": {}}
        for visit in walk(
            model,
            windows,
            names,
            both_streams=self.asymmetric > 0,
            batch=self.batch,
            precision=context.precision,
            what=f"{self.name()} {self.format.kind}",
        ):
            self._quantize(model, visit, bundle.masks, notes)
        if self.embeddings is not None:
            quantize_embeddings(model, self.embeddings)
            notes["embeddings"] = self.embeddings.model_dump()
        model.to("cpu")
        errors = notes.pop("output_error")
        notes["mean_output_error"] = sum(errors.values()) / len(errors)
        notes["worst_output_error"] = max(errors.items(), key=lambda item: item[1])
        return result.evolve(notes=notes)

    def _quantize(self, model: nn.Module, visit: Visit, masks: Any, notes: dict[str, Any]) -> None:
        modules = [model.get_submodule(name) for name in visit.names]
        weight = torch.cat([matrix(module) for module in modules])  # layers with one input: rows stacked
        mask = _stack_masks(visit.names, modules, masks)
        hessian, cross = visit.covariance.means()
        target = weight
        if cross is not None:
            target = asymmetric_target(weight, hessian, cross, self.asymmetric, self.damping)
        factor = factorise(hessian, self.damping)
        if factor.damping > self.damping:
            notes["raised_damping"][visit.names[0]] = factor.damping
        grid = self.format.fit(target if mask is None else target * mask, hessian.diagonal())
        rounder = self.format.column_rounder(grid, weight.shape[1])
        values = gptq(target, factor, rounder, mask)
        rows = [matrix(module).shape[0] for module in modules]
        for name, old, new, scales, zeros in zip(
            visit.names,
            weight.split(rows),
            values.split(rows),
            grid.scales.split(rows),
            grid.zeros.split(rows),
            strict=True,
        ):
            part = type(grid)(scales, zeros)
            put_codes(
                model, name, QuantizedTensor.from_codes(self.format, self.format.codes(new, part), part)
            )
            notes["output_error"][name] = output_error(old, new, hessian)


def _stack_masks(names: list[str], modules: list[nn.Module], masks: Any) -> Tensor | None:
    if not any(name in masks for name in names):
        return None
    parts = [
        masks[name] if name in masks else torch.ones_like(matrix(module), dtype=torch.bool)
        for name, module in zip(names, modules, strict=True)
    ]
    return torch.cat(parts)
