"""What shapes of a model cost: known without making them (parameters, bytes of the file), or measured (share
of the seconds per decoded token or text, in torch on this machine: structured/timing.py).
"""

import copy
from itertools import chain
from math import prod
from typing import Any, Literal

import torch

from compress.artifact.sizes import float_file_bytes
from compress.models.stacks import decoder_blocks
from compress.structured.blocks import keep_blocks
from compress.structured.procedure import ModelShape
from compress.structured.slicing import Kept, UnitCounts, slice_model
from compress.structured.structure import Structure
from compress.structured.timing import CAREFUL, decode_shares, timed

Measure = Literal["parameters", "block_parameters", "bytes", "latency"]


class Costs:
    """What shapes of a model cost, in the units of a target."""

    def __init__(self, model: Any, structure: Structure, measure: Measure) -> None:
        self.model, self.structure, self.measure = model, structure, measure
        self.prefix, blocks = decoder_blocks(model)
        self.whole = ModelShape(len(blocks), UnitCounts.of(structure))
        self._known: dict[ModelShape, float] = {}
        self.timed = timed(model)

    def __call__(self, shape: ModelShape) -> float:
        """Parameters, bytes, or the share of the whole model's time."""
        if shape not in self._known:
            self._known[shape] = self._cost(shape)
        return self._known[shape]

    def _cost(self, shape: ModelShape) -> float:
        if self.measure == "latency":
            return self._latency(shape)
        shapes = self._shapes(shape)
        if self.measure == "bytes":
            return float_file_bytes(shapes)
        inside = self.prefix + "." if self.measure == "block_parameters" else ""
        return sum(prod(size) for name, size in shapes.items() if name.startswith(inside))

    def _shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Of every parameter, tied ones once."""
        structure = self.structure.of_blocks(self.prefix, list(range(shape.layers)))
        last = tuple(f"{self.prefix}.{i}." for i in range(shape.layers, self.whole.layers))
        sizes = {n: list(p.shape) for n, p in self.model.named_parameters() if not n.startswith(last)}
        for sublayer in structure.sublayers:
            for part in sublayer.parts:
                sizes[part.parameter][part.axis] = (
                    getattr(shape.counts, sublayer.kind) * part.entries.shape[1]
                )
        for part in (*structure.stream, *chain.from_iterable(structure.inside_heads)):
            sizes[part.parameter][part.axis] = shape.counts.width * part.entries.shape[1]
        return {name: tuple(size) for name, size in sizes.items()}

    def again(self, shape: ModelShape) -> list[float]:
        """Time the shape anew and for longer: what it costs from now on; the shares of every round."""
        smaller = first_of(self.model, self.structure, shape)
        self._known[shape], rounds = decode_shares(smaller, self.model, CAREFUL)
        return rounds

    def _latency(self, shape: ModelShape) -> float:
        if shape == self.whole:
            return 1.0
        return decode_shares(first_of(self.model, self.structure, shape), self.model)[0]


def first_of(model: Any, structure: Structure, shape: ModelShape) -> Any:
    """A model of the shape, of whatever comes first: for what its numbers do not matter to."""
    counts = shape.counts
    prefix, blocks = decoder_blocks(model)
    if shape.layers < len(blocks):
        model = copy.deepcopy(model)
        keep_blocks(model, prefix, list(range(shape.layers)))
        structure = structure.of_blocks(prefix, list(range(shape.layers)))
    units = {s.reader: torch.arange(getattr(counts, s.kind)) for s in structure.sublayers}
    channels = torch.arange(counts.width)
    return slice_model(
        model, structure, counts, Kept(units, channels, [channels] * len(structure.inside_heads))
    )
