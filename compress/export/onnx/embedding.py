"""The forms a token table takes in ONNX Runtime.

float    `Gather` of rows, shared with a tied head.
blocks   `GatherBlockQuantized`: rows of codes, widened after the gather; shared with a tied head.
rows     8-bit codes with one scale per row and no head that shares them: gather rows, widen.
token    8-bit codes lie as (in, out) for the integer product, so a token is a column: gather columns, widen,
         turn. Rows would cost a second copy of the table.
"""

from torch import Tensor

from compress.export.onnx.architecture import Linear, Weight
from compress.export.onnx.forms import Forms, form_of
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.integers import row_codes
from compress.export.onnx.linear import block_codes, float_weight
from compress.formats import QuantizedTensor

_FLOAT = 1


def embedding(graph: GraphBuilder, name: str, ids: str, table: Weight, forms: Forms, tied: bool) -> str:
    """Rows of `table` (vocabulary, width), kept as `name`: ids int64 (...) -> float32 (..., width).

    `tied`: a head multiplies by the same matrix.
    """
    if isinstance(table, Tensor):
        return graph.op("Gather", float_weight(graph, name, table), ids)
    if form_of(Linear(name, table, None), forms) == "blocks":
        names = block_codes(graph, name, table, rows=True)
        inputs = [names.codes, ids, names.scales, *([names.zeros] if names.zeros else [])]
        layout = names.layout
        rows = graph.op(
            "GatherBlockQuantized",
            *inputs,
            domain=MICROSOFT,
            bits=layout.bits,
            block_size=layout.block,
            gather_axis=0,
            quantize_axis=1,
        )
        padded = layout.codes.shape[1] * layout.block
        if padded == layout.columns:
            return rows
        start, end, axis = (graph.constant([i]) for i in (0, layout.columns, -1))
        return graph.op("Slice", rows, start, end, axis)
    if not tied:
        return _rows(graph, name, ids, table)
    codes, scales, zeros = row_codes(graph, name, table, forms.signed)  # ids (tokens,) only
    columns = graph.op("Cast", graph.op("Gather", codes, ids, axis=1), to=_FLOAT)  # (width, tokens)
    if table.zeros is not None:
        zeros = graph.op("Gather", zeros, ids)  # (tokens,)
    columns = graph.op("Sub", columns, graph.op("Cast", zeros, to=_FLOAT))
    columns = graph.op("Mul", columns, graph.op("Gather", scales, ids))  # (width, tokens) * (tokens,)
    return graph.op("Transpose", columns, perm=[1, 0])


def _rows(graph: GraphBuilder, name: str, ids: str, table: QuantizedTensor) -> str:
    """(q - z) * s of the rows asked for."""
    codes = graph.once(f"{name}.codes", lambda full: graph.weight(full, table.unpacked().cpu().numpy()))
    scales = graph.widened(f"{name}.scales", table.scales.cpu().numpy())  # (vocabulary, 1)
    rows = graph.op("Cast", graph.op("Gather", codes, ids), to=_FLOAT)
    if table.zeros is None:
        zeros = graph.constant(float(table.format.zero))
    else:
        held = graph.once(f"{name}.zeros", lambda full: graph.weight(full, table.grid.zeros.cpu().numpy()))
        zeros = graph.op("Cast", graph.op("Gather", held, ids), to=_FLOAT)  # (tokens, 1)
    return graph.op("Mul", graph.op("Sub", rows, zeros), graph.op("Gather", scales, ids))
