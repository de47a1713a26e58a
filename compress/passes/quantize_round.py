"""quantize_round: round every weight to the nearest code. No data, seconds, the baseline of all others.

At 8 bits there is little left to win; at 4 bits `quantize_gptq` is far better. Grids come from a clip
search on squared weight error (formats/integer.py). Covers the whole model, embeddings and head included.
"""

from functools import partial
from typing import ClassVar

from pydantic import Field
from torch import nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.formats import AnyFormat, Format, Int8, QuantizedTensor
from compress.formats.registry import TABLES, beside
from compress.formats.swap import embedding_names
from compress.layerwise.plain import quantize_one_by_one
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Pass
from compress.tasks.base import Task
from compress.tasks.registry import TASKS


class QuantizeRound(Pass):
    """Round-to-nearest."""

    kind: ClassVar[Kind] = "quantize"
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    streams: ClassVar[bool] = True
    tasks: ClassVar[frozenset[Task]] = TASKS

    format: AnyFormat = Field(Int8(), description="of the linear layers")
    embeddings: AnyFormat | None = Field(default_factory=beside, description=TABLES)
    select: tuple[str, ...] = Field(
        ("*",), min_length=1, description="wildcards of the linear layers to take"
    )
    skip: tuple[str, ...] = Field((), description="wildcards of those to leave float")

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers, then embedding and head."""
        linears = linear_layers(model, self.select, self.skip)
        return linears + (embedding_names(model) if self.embeddings and linears else [])

    def writes(self) -> tuple[Format, ...]:
        """The two formats."""
        return (self.format,) if self.embeddings is None else (self.format, self.embeddings)

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Quantize; weights that were pruned stay zero."""
        names = linear_layers(bundle.model, self.select, self.skip)
        what = f"{self.name()} {self.format.kind}"
        format = self.format.keeping_zeros() if bundle.masks else self.format
        result = quantize_one_by_one(
            bundle, context, names, partial(QuantizedTensor.round, format), self.embeddings, what
        )
        return result.evolve(notes={"format": self.format.model_dump(), "layers": len(names)})
