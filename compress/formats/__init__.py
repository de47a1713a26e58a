"""What stored bits mean: grids, packing, and the layers that hold codes."""

from compress.formats.integer import Format, Grid, Int4, Int8, IntegerFormat
from compress.formats.layers import QuantizedEmbedding, QuantizedLinear, QuantizedTensor

__all__ = [
    "Format",
    "Grid",
    "Int4",
    "Int8",
    "IntegerFormat",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedTensor",
]
