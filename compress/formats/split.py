"""A table whose rows are held in two formats: those that are looked up often, and those that are not."""

import torch
from torch import Tensor, nn

from compress.formats.base import Format
from compress.formats.layers import QuantizedEmbedding, QuantizedTensor

FREQUENT, RARE = "frequent", "rare"  # what the two tables are called in a module

Table = QuantizedEmbedding | nn.Embedding  # of codes; the other is room for them


class SplitEmbedding(nn.Module):
    """Rows of two tables of codes; ids (...) -> (..., in).

    Attributes:
        frequent: the one table.
        rare: the other.
        place: int32 (vocabulary,): a token's row, those of `rare` counted on from those of `frequent`.
    """

    place: Tensor

    def __init__(self, frequent: Table, rare: Table, place: Tensor) -> None:
        super().__init__()
        self.frequent, self.rare = frequent, rare
        self.register_buffer("place", place)
        self.often = frequent.num_embeddings  # rows
        self.num_embeddings = self.often + rare.num_embeddings
        self.embedding_dim = frequent.embedding_dim

    @classmethod
    def of(cls, table: QuantizedEmbedding, often: Tensor, format: Format) -> "SplitEmbedding":
        """Rows of a table that scales nothing: those that are looked up `often`, bool (vocabulary,), as they
        are, and the others rounded to `format`."""
        place = torch.where(often, often.cumsum(0) - 1, (~often).cumsum(0) - 1 + int(often.sum()))
        rows = (~often).nonzero()[:, 0]
        rare = QuantizedTensor.round(format, table.quantized.rows(rows))
        kept = table.quantized.part(often.nonzero()[:, 0])
        return cls(QuantizedEmbedding(kept), QuantizedEmbedding(rare), place.int())

    @property
    def weight(self) -> Tensor:
        """The table that both stand for."""
        whole = torch.cat((self.frequent.weight, self.rare.weight))
        return whole[self.place.long()]

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up in both tables, and take each from the one it is in."""
        place, count = self.place[ids].long(), self.often
        often = self.frequent(place.clamp(max=count - 1))
        seldom = self.rare((place - count).clamp(min=0))
        return torch.where((place < count)[..., None], often, seldom)
