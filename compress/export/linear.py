"""The forms a linear layer takes in ONNX Runtime, and how each reads the codes.

float    `Gemm` with the weight as torch stores it, (out, in): the layout an embedding gathers from, so a
         tied head needs no second copy; measured 1.0-2.9 times as fast as `MatMul` with (in, out).
blocks   `MatMulNBits`: 4- or 8-bit codes with a scale per block of columns. `accuracy_level` 4 rounds
         the activations of each block to 8 bits (fast); 0 computes in float32 from the codes.
token    8-bit codes with one scale per row, multiplied in integers. The activations are rounded to 8 bits
         per token, a = absmax of the row: q = round(127 x / a), y = a (q W^T s / 127). One scale for the
         whole text would be simpler, but a language model's first token is often a thousand times as large
         as the rest. The rounded activations are shared by the layers that read the same input.
tensor   that simpler form, `DynamicQuantizeMatMul`; for comparison.

Of the three forms for 8 bits, `blocks` is the default by measurement (SmolLM2-135M, 2 threads, one run):
161 tokens/s decoded against 141 for `token`, prefill 1497 against 1931, KL 0.009 against 0.037 (`tensor`
0.50).

Scales are stored as float16, which they hold exactly, and widened by a `Cast` that ONNX Runtime folds when
it loads the model. Rows of codes may be stacked (q, k, v): the codes stay as they are.
Both operands of an integer product are unsigned: codes as they are stored, with their zero-point. With signed
weights ONNX Runtime adds pairs of products in 16 bits on x86 processors without VNNI, which is too few.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from compress.export.architecture import Linear, Weight
from compress.export.blocks import Blocks, as_blocks
from compress.export.graph import MICROSOFT, GraphBuilder
from compress.formats import QuantizedTensor

_FLOAT = 1  # TensorProto.FLOAT

Int8Form = Literal["token", "tensor", "blocks"]


@dataclass(frozen=True)
class Forms:
    """Which form integer layers take."""

    int8: Int8Form = "blocks"
    accuracy_level: int = 4


def form_of(weight: Weight, forms: Forms) -> Literal["float", "blocks", "token", "tensor"]:
    """The form this weight takes."""
    if isinstance(weight, Tensor):
        return "float"
    if weight.format.bits == 8 and weight.scales.shape[1] == 1:
        return forms.int8
    return "blocks"


def stackable(layers: Sequence[Linear], forms: Forms) -> bool:
    """Whether layers that read the same input can become one, their rows on top of each other."""
    first = layers[0].weight
    return all(
        form_of(layer.weight, forms) == form_of(first, forms)
        and getattr(layer.weight, "format", None) == getattr(first, "format", None)
        for layer in layers
    )


def stack(layers: Sequence[Linear], name: str) -> Linear:
    """One layer with all the rows; biases that are absent become 0 if another is there."""
    weights = [layer.weight for layer in layers]
    bias = None
    if any(layer.bias is not None for layer in layers):
        bias = torch.cat([torch.zeros(x.outputs) if x.bias is None else x.bias for x in layers])
    if isinstance(weights[0], Tensor):
        return Linear(name, torch.cat([w for w in weights if isinstance(w, Tensor)]), bias)
    coded = [w for w in weights if isinstance(w, QuantizedTensor)]
    merged = QuantizedTensor(coded[0].format, (sum(w.shape[0] for w in coded), coded[0].shape[1]))
    merged.codes = torch.cat([w.codes for w in coded])
    merged.scales = torch.cat([w.scales for w in coded])
    zeros = [w.zeros for w in coded if w.zeros is not None]
    merged.zeros = torch.cat(zeros) if zeros else None
    return Linear(name, merged, bias)


def linear(graph: GraphBuilder, x: str, layer: Linear, forms: Forms) -> str:
    """Apply a layer to x (tokens, in), giving (tokens, out)."""
    weight, bias = layer.weight, ""
    if layer.bias is not None:
        vector = layer.bias.numpy()
        bias = _once(graph, f"{layer.name}.bias", lambda full: graph.weight(full, vector))
    if isinstance(weight, Tensor):
        return graph.op("Gemm", x, float_weight(graph, layer.name, weight), *_optional(bias), transB=1)
    form = form_of(weight, forms)
    if form == "blocks":
        return _block_product(graph, x, layer.name, weight, bias, forms.accuracy_level)
    codes, scales, zeros = row_codes(graph, layer.name, weight)
    if form == "tensor":
        inputs = [x, codes, scales, zeros, bias]
        return graph.op("DynamicQuantizeMatMul", *_strip(inputs), domain=MICROSOFT)
    q, largest, step, middle = _round_tokens(graph, x)
    y = graph.op("MatMulIntegerToFloat", q, codes, step, scales, middle, zeros, domain=MICROSOFT)
    y = graph.op("Mul", y, largest)  # (tokens, out) * (tokens, 1)
    return graph.op("Add", y, bias) if bias else y


def float_weight(graph: GraphBuilder, name: str, weight: Tensor) -> str:
    """A float32 matrix (out, in), stored once however often it is used."""
    return _once(
        graph, f"{name}.weight", lambda full: graph.weight(full, weight.detach().float().cpu().numpy())
    )


def row_codes(graph: GraphBuilder, name: str, weight: QuantizedTensor) -> tuple[str, str, str]:
    """Codes with a scale per row: uint8 (in, out), scales (out,) widened, zero-points () or (out,)."""
    codes = _once(graph, f"{name}.codes", lambda full: graph.weight(full, weight.unpacked().T.numpy()))
    if weight.zeros is None:
        zeros = graph.constant(np.asarray(weight.format.zero, dtype=np.uint8))
    else:
        column = weight.grid.zeros[:, 0].numpy()
        zeros = _once(graph, f"{name}.zeros", lambda full: graph.weight(full, column))
    return codes, _widened(graph, f"{name}.scales", weight.scales[:, 0]), zeros


@dataclass(frozen=True)
class BlockNames:
    """Values that hold a blocked weight; `codes` is (out, blocks * block * bits / 8), two dimensions."""

    codes: str
    scales: str
    zeros: str
    layout: Blocks


def block_codes(graph: GraphBuilder, name: str, weight: QuantizedTensor) -> BlockNames:
    """Codes in blocks, their scales (out, blocks) widened, and packed zero-points or ""."""
    layout = as_blocks(weight)
    rows = layout.codes.shape[0]
    codes = _once(
        graph, f"{name}.codes", lambda full: graph.weight(full, layout.codes.reshape(rows, -1).numpy())
    )
    scales = _widened(graph, f"{name}.scales", layout.scales)
    packed = layout.zeros
    zeros = ""
    if packed is not None:
        zeros = _once(graph, f"{name}.zeros", lambda full: graph.weight(full, packed.cpu().numpy()))
    return BlockNames(codes, scales, zeros, layout)


def _block_product(
    graph: GraphBuilder, x: str, name: str, weight: QuantizedTensor, bias: str, accuracy_level: int
) -> str:
    names = block_codes(graph, name, weight)
    # Folded when the model loads. The file keeps two dimensions because that is what the embedding of a
    # tied head gathers from, straight from the mapped file.
    codes = graph.op("Reshape", names.codes, graph.constant(list(names.layout.codes.shape)))
    return graph.op(
        "MatMulNBits",
        *_strip([x, codes, names.scales, names.zeros, "", bias]),
        domain=MICROSOFT,
        K=names.layout.columns,
        N=int(names.layout.codes.shape[0]),
        bits=names.layout.bits,
        block_size=names.layout.block,
        accuracy_level=accuracy_level,
    )


def _round_tokens(graph: GraphBuilder, x: str) -> tuple[str, str, str, str]:
    """x (tokens, in) as uint8 around 128, the largest magnitude per token (tokens, 1), the step, the middle.

    An all-zero row divides 0 by 0; whatever integer that becomes is multiplied by a largest magnitude of 0.
    """
    step, middle = graph.constant(1.0 / 127.0), graph.constant(np.asarray(128, dtype=np.uint8))

    def add() -> str:
        largest = graph.op("ReduceMax", graph.op("Abs", x), graph.constant([-1]), keepdims=1)
        graph.shared["largest", x] = largest
        return graph.op("QuantizeLinear", graph.op("Div", x, largest), step, middle)

    if ("rounded", x) not in graph.shared:
        graph.shared["rounded", x] = add()
    return graph.shared["rounded", x], graph.shared["largest", x], step, middle


def _widened(graph: GraphBuilder, name: str, scales: Tensor) -> str:
    def store(full: str) -> str:
        return graph.op("Cast", graph.weight(full, scales.cpu().numpy()), to=_FLOAT)

    return _once(graph, name, store)


def _once(graph: GraphBuilder, name: str, store: Callable[[str], str]) -> str:
    """The value of a stored weight; a tied head has its embedding's name, so it finds that one's."""
    if name not in graph.shared:
        graph.shared[name] = store(name)
    return graph.shared[name]


def _optional(name: str) -> tuple[str, ...]:
    return (name,) if name else ()


def _strip(inputs: Sequence[str]) -> list[str]:
    """Absent inputs at the end are left out, as ONNX wants."""
    names = list(inputs)
    while names and not names[-1]:
        names.pop()
    return names
