"""The forms a linear layer takes in ONNX Runtime, and how each reads the codes.

float    `Gemm` with the weight as torch stores it, (out, in): the layout an embedding gathers from, so a
         tied head needs no second copy; measured 1.0-2.9 times as fast as `MatMul` with (in, out).
blocks   `MatMulNBits`: 2-, 4- or 8-bit codes with a scale per block of columns. `accuracy_level` 4 rounds
         the activations of each block to 8 bits (fast); 0 computes in float32 from the codes.
token    8-bit codes with one scale per row, multiplied in integers by activations that are rounded per
tensor   token, or per tensor; see `integers.py`.
static   the same with activations on a grid that calibration has fixed; see `static.py`.

Of the forms for 8 bits `blocks` is the default of decoders by measurement (SmolLM2-135M, 2 threads, one run,
before `token` was made exact): 161 tokens/s decoded against 141 for `token`, prefill 1497 against 1931, KL
0.009 against 0.037. Encoders take `token`: `blocks` multiplies their many rows at 0.7 times the speed of
float32 on a processor without VNNI.

Scales are stored as float16, which they hold exactly, and widened by a `Cast` that ONNX Runtime folds when
it loads the model. Rows of codes may be stacked (q, k, v): the codes stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.export.onnx.architecture import Linear
from compress.export.onnx.blocks import Blocks, as_blocks
from compress.export.onnx.forms import Forms, form_of
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.integers import product
from compress.export.onnx.static import static_product
from compress.formats import QuantizedTensor


def stackable(layers: Sequence[Linear], forms: Forms) -> bool:
    """Whether layers that read the same input can become one, their rows on top of each other."""
    first = layers[0]
    return all(
        form_of(layer, forms) == form_of(first, forms)
        and getattr(layer.weight, "format", None) == getattr(first.weight, "format", None)
        and _same(layer.bounds, first.bounds)
        for layer in layers
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def stack(layers: Sequence[Linear], name: str) -> Linear:
    """One layer with all the rows; biases that are absent become 0 if another is there."""
    weights = [layer.weight for layer in layers]
    bias = None
    if any(layer.bias is not None for layer in layers):
        bias = torch.cat([torch.zeros(x.outputs) if x.bias is None else x.bias for x in layers])
    if isinstance(weights[0], Tensor):
        return Linear(name, torch.cat([w for w in weights if isinstance(w, Tensor)]), bias, layers[0].bounds)
    coded = [w for w in weights if isinstance(w, QuantizedTensor)]
    merged = QuantizedTensor(coded[0].format, (sum(w.shape[0] for w in coded), coded[0].shape[1]))
    merged.codes = torch.cat([w.codes for w in coded])
    merged.scales = torch.cat([w.scales for w in coded])
    zeros = [w.zeros for w in coded if w.zeros is not None]
    merged.zeros = torch.cat(zeros) if zeros else None
    return Linear(name, merged, bias, layers[0].bounds)


def linear(graph: GraphBuilder, x: str, layer: Linear, forms: Forms) -> str:
    """Apply a layer to x (..., in), giving (..., out); x (tokens, in) where the weight is float."""
    weight, bias = layer.weight, ""
    if layer.bias is not None:
        vector = layer.bias.numpy()
        bias = graph.once(f"{layer.name}.bias", lambda full: graph.weight(full, vector))
    if isinstance(weight, Tensor):
        return graph.op("Gemm", x, float_weight(graph, layer.name, weight), bias, transB=1)
    form = form_of(layer, forms)
    if form == "static":
        return static_product(graph, x, layer, bias, signed=forms.processor == "vnni")
    if form != "blocks":
        return product(graph, x, layer.name, weight, bias, forms)
    return _block_product(graph, x, layer.name, weight, bias, forms.accuracy_level)


def float_weight(graph: GraphBuilder, name: str, weight: Tensor) -> str:
    """A float32 matrix (out, in), stored once however often it is used."""
    return graph.once(
        f"{name}.weight", lambda full: graph.weight(full, weight.detach().float().cpu().numpy())
    )


@dataclass(frozen=True)
class BlockNames:
    """Values that hold a blocked weight; `codes` has the layout's three dimensions, or two: (out, bytes)."""

    codes: str
    scales: str
    zeros: str
    layout: Blocks


def block_codes(graph: GraphBuilder, name: str, weight: QuantizedTensor, rows: bool = False) -> BlockNames:
    """Codes in blocks, their scales (out, blocks) widened, and packed zero-points or "".

    `rows`: codes of a row together, as an embedding gathers them. A tied head has both from the same bytes.
    """
    layout = as_blocks(weight)
    array = layout.codes.numpy()
    codes = _stored(graph, f"{name}.codes", array.reshape(len(array), -1) if rows else array)
    scales = graph.widened(f"{name}.scales", layout.scales.cpu().numpy())
    packed = layout.zeros
    zeros = ""
    if packed is not None:
        zeros = graph.once(f"{name}.zeros", lambda full: graph.weight(full, packed.cpu().numpy()))
    return BlockNames(codes, scales, zeros, layout)


def _stored(graph: GraphBuilder, name: str, array: np.ndarray) -> str:
    """A value of this shape; a Reshape in the graph would be folded as it loads, into a copy in memory."""

    def make(key: tuple[str, tuple[int, ...]]) -> str:
        if name in graph.shared:
            return graph.view(f"{name}.{array.ndim}d", name, array)
        return graph.once(name, lambda full: graph.weight(full, array))

    return graph.once((name, array.shape), make)


def _block_product(
    graph: GraphBuilder, x: str, name: str, weight: QuantizedTensor, bias: str, accuracy_level: int
) -> str:
    names = block_codes(graph, name, weight)
    return graph.op(
        "MatMulNBits",
        x,
        names.codes,
        names.scales,
        names.zeros,
        "",
        bias,
        domain=MICROSOFT,
        K=names.layout.columns,
        N=int(names.layout.codes.shape[0]),
        bits=names.layout.bits,
        block_size=names.layout.block,
        accuracy_level=accuracy_level,
    )
