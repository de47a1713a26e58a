"""store_sparse: a file in which zeros take a bit each.

Every matrix of a linear layer that gets smaller by it is written as a bitmask and the values that are not
zero, in the order of rows (formats/sparse.py), floats and codes alike: float32 with half of it zero takes
53 %, int4 codes 75 %. Nothing else changes: loaded again, the weights are the same bit for bit, dense by
default. The next pass of a chain works on the dense model and is saved dense, so this one comes last.

Floats that 16 bits hold exactly are written in 16 bits (artifact/sparse.py); `dtype` rounds all to such.

With `packed` the matrices stay so in memory where the model is only run, and are unpacked at every call:
fewer resident bytes, more time. Neither makes a forward pass faster.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from compress.artifact.bundle import Bundle
from compress.artifact.counts import unique_state, weight_bytes
from compress.artifact.sparse import compact
from compress.context import Context
from compress.errors import UserError
from compress.formats.swap import coded_layers
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Pass
from compress.tasks.base import Task
from compress.tasks.registry import TASKS


class StoreSparse(Pass):
    """Save bitmasks and values in place of matrices with many zeros."""

    kind: ClassVar[Kind] = "store"
    tasks: ClassVar[frozenset[Task]] = TASKS

    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="what float weights are rounded to, head and embeddings included"
    )
    packed: bool = Field(False, description="also in memory, when the model is only run: smaller, slower")

    def layers(self, model: nn.Module) -> list[str]:
        """The linear layers of the blocks, in float and with codes."""
        return linear_layers(model) + coded_layers(model)

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """The same weights, to be saved sparse.

        Notes: how many `matrices`; bytes of all weights, dense as this package holds them, and as written.

        Raises:
            UserError: a weight too large for the type.
        """
        result = bundle.clone()
        with torch.no_grad():
            for parameter in result.model.parameters():
                rounded = parameter.to(getattr(torch, self.dtype)).to(parameter.dtype)
                if not torch.isfinite(rounded).all():
                    raise UserError(f"dtype: {self.dtype} does not hold the largest weights; use bfloat16")
                parameter.copy_(rounded + 0.0)  # -0 becomes 0, whose sign a bitmask does not keep
        state, records = compact(unique_state(result.model), result.model)
        notes = {
            "matrices": len(records),
            "dense_bytes": weight_bytes(result.model),
            "sparse_bytes": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
        }
        return result.evolve(storage="packed" if self.packed else "sparse", notes=notes)
