"""prune_magnitude: set the smallest weights to zero.

Per layer (`scope: layer`), or with one threshold for all of them (`scope: model`), or a pattern such as
2:4. Exactly the asked number goes. Zeros alone make a model neither smaller nor faster: what it gains is
measured, and usually comes from what follows. The masks travel: healing and quantizing keep every zero.

Han et al. 2015, arXiv 1506.02626; one threshold for all layers: Frankle and Carbin 2019.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.bundle import Bundle
from compress.formats.swap import matrix
from compress.passes.base import Context, Kind, Pass, linear_layers
from compress.solvers import masks as solve


class PruneMagnitude(Pass):
    """Unstructured or N:M pruning by the size of the weights."""

    kind: ClassVar[Kind] = "prune"
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of the selected weights that becomes zero")
    scope: Literal["layer", "model"] = Field("layer", description="where the share holds")
    pattern: str | None = Field(
        None, pattern=r"^[1-9][0-9]?:[1-9][0-9]?$", description="N:M, as 2:4; replaces `sparsity`"
    )
    select: tuple[str, ...] = Field(
        ("*",), min_length=1, description="wildcards of the linear layers to take"
    )
    skip: tuple[str, ...] = Field((), description="wildcards of those to leave dense")

    @model_validator(mode="after")
    def _pattern_keeps_some(self) -> "PruneMagnitude":
        if self.pattern is not None:
            kept, of = map(int, self.pattern.split(":"))
            if kept >= of:
                raise ValueError(f"pattern: '{self.pattern}' removes nothing; N must be less than M")
        return self

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers."""
        return linear_layers(model, self.select, self.skip)

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Prune; the new masks are added to those the bundle already carries."""
        result = bundle.clone()
        modules = {name: result.model.get_submodule(name) for name in self.layers(result.model)}
        masks = self._masks({name: matrix(module).abs() for name, module in modules.items()})
        for name, module in modules.items():
            if name in bundle.masks:
                masks[name] &= bundle.masks[name]
            weight = module.weight
            assert isinstance(weight, Tensor)
            transposed = type(module).__name__ == "Conv1D"
            with torch.no_grad():
                weight.mul_(masks[name].T if transposed else masks[name])
        removed = sum(int((~mask).sum()) for mask in masks.values())
        total = sum(mask.numel() for mask in masks.values())
        notes = {"removed": removed, "of": total, "sparsity": removed / total}
        return result.evolve(masks={**bundle.masks, **masks}, notes=notes)

    def _masks(self, sizes: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.pattern is not None:
            kept, of = map(int, self.pattern.split(":"))
            return {name: solve.pattern(size, kept, of) for name, size in sizes.items()}
        if self.scope == "layer":
            return {n: solve.smallest(size, round(self.sparsity * size.numel())) for n, size in sizes.items()}
        everything = torch.cat([size.flatten() for size in sizes.values()])
        mask = solve.smallest(everything, round(self.sparsity * everything.numel()))
        parts = mask.split([size.numel() for size in sizes.values()])
        return {n: part.view_as(size) for (n, size), part in zip(sizes.items(), parts, strict=True)}
