"""Products in integers: 8-bit codes with one scale per row times activations rounded to 8 bits or 7.

Maths. With codes q_w, zero-points z and scales s of the rows, and activations x = t (q_x - m) + rounding,

    y = t s sum (q_x - m) (q_w - z),        the sum in 32 bits,

where t is the step and m the middle of the activations' grid. The step is

    token    of each row of x, a / L with a its largest magnitude and L the grid's largest number. One for
             the whole text would be simpler, but a language model's first token is often a thousand times as
             large as the rest.
    tensor   of the whole of x; the cheapest.

What a processor adds up. x86 without VNNI adds pairs of products of unsigned and signed bytes in 16 bits, and
cuts off what is too large: with 8-bit activations and signed codes the result can be far off. Either of these
is exact everywhere:

    7 bits   L = 63, m = 64: no pair exceeds 2 * 127 * 128 < 2^15. Codes are signed, the operands for which
             every processor has its fastest instructions.
    8 bits   L = 127, m = 128: codes stay unsigned, for which ONNX Runtime adds in 32 bits: half the step,
             more time.

A processor with VNNI (or ARM's dot product) adds four products in 32 bits. For those alone there is

    vnni     L = 127, m = 128 and signed codes: the fastest instructions and the finer step.

Measured on a processor without VNNI (AVX2, one thread, 1024 x 384 times 384 x 1536, per token): float32 16.6
ms, 7 bits 10.2, 8 bits 12.3. With VNNI (AVX512, two threads, 512 x 576 times 576 x 3072, rounding included)
signed codes take 1.1 ms, 8-bit `MatMulNBits` 2.7, float32 3.6; unsigned codes take twice the time of signed.
all-MiniLM-L6, codes of `quantize_round`, 32 texts of 128 tokens: mean cosine to float32 0.9954 with 7 bits,
0.9977 with 8, 0.9995 with float activations; `tensor` 0.889 with 7. Rounded activations are shared by the
layers that read the same input.
"""

import numpy as np

from compress.export.onnx.forms import Forms
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.formats import QuantizedTensor

_FLOAT = 1  # TensorProto.FLOAT


def row_codes(
    graph: GraphBuilder, name: str, weight: QuantizedTensor, signed: bool, *, per_row: bool = False
) -> tuple[str, str, str]:
    """What is stored of a matrix (out, in) with a scale per row.

    Codes int8 or uint8 (in, out), scales (out,) widened, zero-points () or (out,) of the type of the codes;
    (out,) in any case if asked for `per_row`.
    """
    kind, shift = (np.int8, 128) if signed else (np.uint8, 0)

    def stored(codes: np.ndarray) -> np.ndarray:
        return (codes.astype(np.int16) - shift).astype(kind)

    codes = graph.once(f"{name}.codes", lambda full: graph.weight(full, stored(weight.unpacked().T.numpy())))
    scales = graph.widened(f"{name}.scales", weight.scales[:, 0].cpu().numpy())
    if weight.zeros is None:
        shape = weight.shape[:1] if per_row else ()
        return codes, scales, graph.constant(stored(np.full(shape, weight.format.zero)))
    column = weight.grid.zeros[:, 0].cpu().numpy()
    return codes, scales, graph.once(f"{name}.zeros", lambda full: graph.weight(full, stored(column)))


def product(graph: GraphBuilder, x: str, name: str, weight: QuantizedTensor, bias: str, forms: Forms) -> str:
    """x (..., in) -> (..., out), with the bias named, if any."""
    codes, scales, zeros = row_codes(graph, name, weight, forms.signed)
    largest = 63 if forms.activation_bits == 7 else 127
    middle = graph.constant(np.asarray(largest + 1, dtype=np.uint8))
    unit = graph.constant(1.0 / largest)
    if forms.int8 == "tensor":
        step = graph.once(("step", x), lambda _: graph.op("Mul", _magnitude(graph, x, rows=False), unit))
        q = graph.once(("rounded", x), lambda _: graph.op("QuantizeLinear", x, step, middle))
        return graph.op(_FUSED, q, codes, step, scales, middle, zeros, bias, domain=MICROSOFT)
    a = graph.once(("magnitude", x), lambda _: _magnitude(graph, x, rows=True))
    columns = weight.shape[1] if forms.many_rows else None
    q = graph.once(("rounded", x), lambda _: _rounded(graph, x, a, unit, middle, columns))
    y = graph.op(_FUSED, q, codes, unit, scales, middle, zeros, domain=MICROSOFT)
    y = graph.op("Mul", y, a)  # (tokens, out) * (tokens, 1)
    # less its negative, which is folded: ONNX Runtime makes one node of an Add and a Gelu, which takes longer
    # than both (1.31, 1024 x 1536, 2 threads: 0.6 ms and 0.4)
    return graph.op("Sub", y, graph.op("Neg", bias)) if bias else y


_FUSED = "MatMulIntegerToFloat"


def _rounded(graph: GraphBuilder, x: str, a: str, unit: str, middle: str, columns: int | None) -> str:
    """x in steps a / L, a (..., 1).

    With the number of columns given, each row is a block with a step of its own, and is read once: 0.8 of the
    time for 1024 rows of 1536, two thirds for 384, and more for one row, since it takes another node.
    """
    if columns is None:
        return graph.op("QuantizeLinear", graph.op("Div", x, a), unit, middle)
    # as many middles as rows: whatever a row's magnitude, it is nothing to a step so large
    middles = graph.op("QuantizeLinear", a, graph.constant(3e38), middle)
    return graph.op("QuantizeLinear", x, graph.op("Mul", a, unit), middles, axis=-1, block_size=columns)


def _magnitude(graph: GraphBuilder, x: str, rows: bool) -> str:
    """The largest |x|: (tokens, 1), or () for all rows.

    An all-zero row divides 0 by 0; whatever integer that becomes is multiplied by a magnitude of 0.
    """
    axes = [graph.constant([-1])] if rows else []
    return graph.op("ReduceMax", graph.op("Abs", x), *axes, keepdims=int(rows))
