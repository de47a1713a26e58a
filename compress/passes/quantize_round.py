"""quantize_round: round every weight to the nearest code. No data, seconds, the baseline of all others.

At 8 bits there is little left to win; at 4 bits `quantize_gptq` is far better. Grids come from a clip
search on squared weight error (formats/integer.py). Covers the whole model, embeddings and head included.
"""

from typing import ClassVar

from pydantic import Field
from torch import nn

from compress.bundle import Bundle
from compress.formats import Format, Int8, IntegerFormat, QuantizedTensor
from compress.formats.swap import embedding_names, matrix, put_codes, quantize_embeddings
from compress.passes.base import Context, Kind, Pass, block_names, linear_layers
from compress.progress import track
from compress.tasks import TASKS, Task


class QuantizeRound(Pass):
    """Round-to-nearest."""

    kind: ClassVar[Kind] = "quantize"
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    streams: ClassVar[bool] = True
    tasks: ClassVar[frozenset[Task]] = TASKS

    format: Format = Field(Int8(), description="of the linear layers")
    embeddings: Format | None = Field(Int8(), description="of embedding and head; null leaves them float")
    select: tuple[str, ...] = Field(
        ("*",), min_length=1, description="wildcards of the linear layers to take"
    )
    skip: tuple[str, ...] = Field((), description="wildcards of those to leave float")

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers, then embedding and head."""
        linears = linear_layers(model, self.select, self.skip)
        return linears + (embedding_names(model) if self.embeddings and linears else [])

    def writes(self) -> tuple[IntegerFormat, ...]:
        """The two formats."""
        return (self.format,) if self.embeddings is None else (self.format, self.embeddings)

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Quantize. Zero is on every grid, so weights that were pruned stay zero."""
        result = bundle.clone()
        model, store = result.model, result.offload(context.workdir / "parts")
        names = linear_layers(model, self.select, self.skip)
        with track(len(names), f"{self.name()} {self.format.kind}", "layers") as progress:
            for block in block_names(model):
                if store:
                    store.load(block)
                for name in [name for name in names if name.startswith(f"{block}.")]:
                    weight = matrix(model.get_submodule(name))
                    put_codes(model, name, QuantizedTensor.round(self.format, weight))
                    progress.advance()
                if store:
                    store.release(block)
        if store:
            store.load_rest()
        if self.embeddings is not None:
            quantize_embeddings(model, self.embeddings)
        notes = {"format": self.format.model_dump(), "layers": len(names)}
        return result.evolve(notes=notes, shards=None, parts=tuple(store.parts) if store else ())
