"""What stored bits mean: grids, packing, and the layers that hold codes."""

from compress.formats.integer import Format, Grid, Int2, Int3, Int4, Int5, Int6, Int8, IntegerFormat
from compress.formats.layers import QuantizedEmbedding, QuantizedLinear, QuantizedTensor

__all__ = [
    "Format",
    "Grid",
    "Int2",
    "Int3",
    "Int4",
    "Int5",
    "Int6",
    "Int8",
    "IntegerFormat",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedTensor",
]
