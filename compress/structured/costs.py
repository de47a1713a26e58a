"""What shapes of a model cost: known without making them (parameters, bytes of the file), or measured (share
of the seconds per decoded token or text, in torch on this machine: structured/timing.py).
"""

from itertools import chain
from math import prod
from typing import Any, Literal

import torch

from compress.artifact.sizes import float_file_bytes
from compress.structured.blocks import lists_of_blocks
from compress.structured.procedure import ModelShape
from compress.structured.slicing import Kept, held, slice_model
from compress.structured.structure import Structure
from compress.structured.subcloning import Widths, subclone
from compress.structured.timing import CAREFUL, decode_shares, timed

Measure = Literal["parameters", "block_parameters", "bytes", "latency"]


class Costs:
    """What shapes of a model cost, in the units of a target."""

    def __init__(self, model: Any, structure: Structure, measure: Measure) -> None:
        self.model, self.structure, self.measure = model, structure, measure
        self.lists = [name for name, _ in lists_of_blocks(model)]
        self.whole = ModelShape.of(model, structure)
        self._stored = held(model).keys()
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
            buffers = {name: tuple(b.shape) for name, b in self.model.named_buffers() if name in self._stored}
            return float_file_bytes(shapes | buffers)
        inside = tuple(f"{name}." for name in self.lists) if self.measure == "block_parameters" else ""
        return sum(prod(size) for name, size in shapes.items() if name.startswith(inside))

    def _shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Of every parameter, tied ones once."""
        structure = self.structure
        last: tuple[str, ...] = ()
        for name, kept, count in zip(self.lists, shape.blocks, self.whole.blocks, strict=True):
            structure = structure.of_blocks(name, list(range(kept)))
            last += tuple(f"{name}.{i}." for i in range(kept, count))
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
    kept = {
        name: list(range(count))
        for (name, _), count in zip(lists_of_blocks(model), shape.blocks, strict=True)
    }
    if shape.blocks != ModelShape.of(model, structure).blocks:
        model, _ = subclone(model, kept, Widths.of(model.config), {})
        for name, numbers in kept.items():
            structure = structure.of_blocks(name, numbers)
    units = {s.reader: torch.arange(getattr(counts, s.kind)) for s in structure.sublayers}
    channels = torch.arange(counts.width)
    return slice_model(
        model, structure, counts, Kept(units, channels, [channels] * len(structure.inside_heads))
    )
