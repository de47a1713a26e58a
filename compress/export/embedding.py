"""The forms a token table takes in ONNX Runtime; each shares its codes with a tied head.

float    `Gather` of rows.
blocks   `GatherBlockQuantized`: rows of codes, widened after the gather.
token    8-bit codes lie as (in, out) for the integer product, so a token is a column: gather columns, widen,
         turn. Rows would cost a second copy of the table.
"""

from torch import Tensor

from compress.export.architecture import Weight
from compress.export.graph import MICROSOFT, GraphBuilder
from compress.export.linear import Forms, block_codes, float_weight, form_of, row_codes

_FLOAT = 1


def embedding(graph: GraphBuilder, name: str, ids: str, table: Weight, forms: Forms) -> str:
    """Rows of `table` (vocabulary, width), kept as `name`: ids int64 (tokens,) -> float32 (tokens, width)."""
    if isinstance(table, Tensor):
        return graph.op("Gather", float_weight(graph, name, table), ids)
    if form_of(table, forms) == "blocks":
        names = block_codes(graph, name, table)
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
        start, end, axis = (graph.constant([i]) for i in (0, layout.columns, 1))
        return graph.op("Slice", rows, start, end, axis)
    codes, scales, zeros = row_codes(graph, name, table)
    columns = graph.op("Cast", graph.op("Gather", codes, ids, axis=1), to=_FLOAT)  # (width, tokens)
    if table.zeros is not None:
        zeros = graph.op("Gather", zeros, ids)  # (tokens,)
    columns = graph.op("Sub", columns, graph.op("Cast", zeros, to=_FLOAT))
    columns = graph.op("Mul", columns, graph.op("Gather", scales, ids))  # (width, tokens) * (tokens,)
    return graph.op("Transpose", columns, perm=[1, 0])
