"""quantize_bitsandbytes: NF4 and LLM.int8 as the library bitsandbytes computes them.

For comparison, and for those who want exactly these grids. The library chooses codes and scales; they are
stored in our artifact and read without it. Scales become float16 (the library keeps float32), so values
differ from its own by half a unit of float16 at most. Its double quantization of scales is left out.

Dettmers et al.: LLM.int8 (2022), arXiv 2208.07339; QLoRA (2023), arXiv 2305.14314.
"""

from importlib.util import find_spec
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import MissingExtra, UserError, about
from compress.formats import (
    Activations,
    AnyFormat,
    Format,
    Grid,
    Int8,
    Nf4,
    QuantizedLinear,
    QuantizedTensor,
)
from compress.formats.base import float16_exact, require_reach
from compress.formats.swap import embedding_names, quantize_embeddings
from compress.host.progress import track
from compress.models.layers import linear_layers, matrix, replace_module
from compress.passes.base import Kind, Pass


class QuantizeBitsandbytes(Pass):
    """The grids of bitsandbytes."""

    kind: ClassVar[Kind] = "quantize"
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    method: Literal["nf4", "llm_int8"] = "nf4"
    threshold: float = Field(6.0, gt=0, description="magnitude of activations that `llm_int8` keeps float")
    embeddings: AnyFormat | None = Field(Int8(), description="of embedding and head; null leaves them float")
    select: tuple[str, ...] = Field(
        ("*",), min_length=1, description="wildcards of the linear layers to take"
    )
    skip: tuple[str, ...] = Field((), description="wildcards of those to leave float")

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers, then embedding and head.

        Raises:
            MissingExtra: the library is not installed.
        """
        if find_spec("bitsandbytes") is None:
            raise MissingExtra("bitsandbytes", "bitsandbytes", f"the pass {self.name()}")
        linears = linear_layers(model, self.select, self.skip)
        if self.method == "nf4":
            for name in linears:
                columns = matrix(model.get_submodule(name)).shape[1]
                if columns % 64:
                    raise UserError(
                        f"{self.name()}: '{name}' is {columns} wide, and the library's blocks of 64 would "
                        "run across its rows; skip it, or use quantize_round with the format nf4"
                    )
        return linears + (embedding_names(model) if self.embeddings and linears else [])

    def writes(self) -> tuple[Format, ...]:
        """The formats of linear layers and embeddings."""
        linear: Format = Nf4() if self.method == "nf4" else Int8()
        return (linear,) if self.embeddings is None else (linear, self.embeddings)

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Quantize; weights that are zero stay zero."""
        result = bundle.clone()
        model = result.model
        names = linear_layers(model, self.select, self.skip)
        rule = Activations(outliers=self.threshold) if self.method == "llm_int8" else None
        with track(len(names), f"{self.name()} {self.method}", "layers") as progress:
            for name in names:
                module = model.get_submodule(name)
                with about(name):
                    held = _nf4(matrix(module)) if self.method == "nf4" else _int8(matrix(module))
                replace_module(model, name, QuantizedLinear(held, getattr(module, "bias", None), rule))
                progress.advance()
        if self.embeddings is not None:
            quantize_embeddings(model, self.embeddings)
        return result.evolve(notes={"method": self.method, "layers": len(names)})


def _nf4(weight: Tensor) -> QuantizedTensor:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
    pairs = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=-1)  # the first in the high half
    require_reach(Nf4(), state.absmax)
    scales = float16_exact(state.absmax.float().view(len(weight), -1))
    grid = Grid(scales, torch.full_like(scales, Nf4().zero, dtype=torch.uint8))
    return QuantizedTensor.from_codes(Nf4(), pairs.view(weight.shape), grid)


def _int8(weight: Tensor) -> QuantizedTensor:
    from bitsandbytes.functional import int8_vectorwise_quant

    half = weight.contiguous().half()
    if half.isinf().any():
        raise UserError(
            f"a weight of {float(weight.abs().max()):.4g} is beyond float16, which llm_int8 reads; leave the "
            "layer out (`skip`), or use quantize_round with the format int8"
        )
    codes, largest, _ = int8_vectorwise_quant(half)
    scales = float16_exact(largest.float()[:, None] / 127)
    grid = Grid(scales, torch.full_like(scales, Int8().zero, dtype=torch.uint8))
    return QuantizedTensor.from_codes(Int8(), (codes.to(torch.int16) + 128).to(torch.uint8), grid)
