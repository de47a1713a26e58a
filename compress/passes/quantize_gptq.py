"""quantize_gptq: few-bit weights that compensate each other's rounding errors and those made before them.

The method is layerwise/quantize.py's; here all linear layers get one format. Embedding and head are
rounded to the format `embeddings`, tied ones together. Needs calibration text.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.formats import AnyFormat, Format, Int4
from compress.formats.registry import TABLES, beside
from compress.formats.swap import embedding_names, quantize_embeddings
from compress.layerwise.quantize import LayerSolver, quantize_sequentially
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Need, Pass
from compress.tasks.base import Task
from compress.tasks.registry import TASKS


class QuantizeGPTQ(Pass, LayerSolver):
    """GPTQ with static groups, falling-diagonal order and the asymmetric target."""

    kind: ClassVar[Kind] = "quantize"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    streams: ClassVar[bool] = True
    tasks: ClassVar[frozenset[Task]] = TASKS

    format: AnyFormat = Field(Int4(), description="of the linear layers")
    embeddings: AnyFormat | None = Field(default_factory=beside, description=TABLES)
    select: tuple[str, ...] = Field(
        ("*",), min_length=1, description="wildcards of the linear layers to take"
    )
    skip: tuple[str, ...] = Field((), description="wildcards of those to leave float")

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers, then embedding and head."""
        self.check_outputs(model)
        linears = linear_layers(model, self.select, self.skip)
        return linears + (embedding_names(model) if self.embeddings and linears else [])

    def writes(self) -> tuple[Format, ...]:
        """The two formats."""
        return (self.format,) if self.embeddings is None else (self.format, self.embeddings)

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """About two forward passes over the calibration text, their second moments, and the solver."""
        return (4.0 + 2.5) * parameters * calibration_tokens + self.flops_of_outputs(parameters)

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Quantize; notes tell the layers' output errors and any damping that had to be raised."""
        result = bundle.clone()
        store = result.offload(context.workdir / "parts", whole=self.outputs == "fisher")
        model = result.model if store else result.model.to(context.device)
        windows = torch.from_numpy(context.data.calibration.tokens).long()
        names = linear_layers(model, self.select, self.skip)
        notes = quantize_sequentially(
            model,
            windows,
            dict.fromkeys(names, self.format),
            self,
            masks=bundle.masks,
            precision=context.precision,
            store=store,
            seed=context.seed,
            what=f"{self.name()} {self.format.kind}",
        )
        notes["format"] = self.format.model_dump()
        if store:
            store.load_rest()
        if self.embeddings is not None:
            quantize_embeddings(model, self.embeddings)
            notes["embeddings"] = self.embeddings.model_dump()
        if store is None:
            model.to("cpu")
        return result.evolve(notes=notes, shards=None, parts=tuple(store.parts) if store else ())
