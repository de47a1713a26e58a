"""What stored bits mean: grids, packing, and the layers that hold codes."""

from compress.formats.activations import Activations
from compress.formats.base import Format, Grid
from compress.formats.coded.coded import Coded
from compress.formats.integer import AffineFormat, Int2, Int3, Int4, Int5, Int6, Int8
from compress.formats.layers import QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from compress.formats.nf4 import Nf4
from compress.formats.registry import AnyFormat

__all__ = [
    "Activations",
    "AffineFormat",
    "AnyFormat",
    "Coded",
    "Format",
    "Grid",
    "Int2",
    "Int3",
    "Int4",
    "Int5",
    "Int6",
    "Int8",
    "Nf4",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedTensor",
]
