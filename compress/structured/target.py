"""A target that is met: how many heads, neurons and blocks may stay.

What a shape costs is known without making it (parameters, bytes of the file), or measured (seconds per
decoded token, in torch on this machine, interleaved with the whole model so that both see the same machine).
It falls with every count, so that for each number of heads and blocks the most neurons that meet the target
are found by bisection. These shapes cost the same; which is best is the model's affair, so it is measured:
each is pruned on a few calibration windows, and its KL from the original on others decides.

Limits: shapes are compared on few windows, and a latency is that of the machine it was measured on.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from compress.artifact.sizes import float_file_bytes
from compress.errors import UserError
from compress.models.stacks import decoder_blocks
from compress.structured.blocks import keep_blocks
from compress.structured.procedure import ModelShape
from compress.structured.slicing import Kept, UnitCounts, possible, slice_model
from compress.structured.structure import Structure

Measure = Literal["parameters", "block_parameters", "bytes", "latency"]
Dimension = Literal["neurons", "heads", "layers"]
_PROMPT, _STEPS, _ROUNDS = 32, 8, 5
_LEAST = 0.25  # of the neurons: a shape with fewer is not tried


class CostTarget(BaseModel):
    """What the pruned model may cost at most, and what may be taken for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: float | None = Field(None, gt=0, description="of the model; up to 1: a share of what it has")
    block_parameters: float | None = Field(
        None, gt=0, description="of the blocks, without embeddings; as above"
    )
    bytes: float | None = Field(None, gt=0, description="of the weight file in float32; as above")
    latency: float | None = Field(
        None, gt=0, le=1, description="share of the time per decoded token, in torch on this machine"
    )
    take: tuple[Dimension, ...] = Field(("neurons", "heads"), min_length=1, description="what may be taken")
    shapes: int = Field(4, ge=1, le=64, description="shapes that are tried out; 1: neurons first")
    fit_windows: int = Field(2, ge=1, description="calibration windows to prune a shape with")
    judge_windows: int = Field(1, ge=1, description="other calibration windows to judge it on")

    @model_validator(mode="after")
    def _one_measure(self) -> "CostTarget":
        given = [name for name in get_args(Measure) if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give one of parameters, block_parameters, bytes and latency")
        return self

    @property
    def measure(self) -> Measure:
        """Which of them it is."""
        return next(name for name in get_args(Measure) if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        """Its value, absolute or a share."""
        return float(getattr(self, self.measure))


class Costs:
    """What shapes of a model cost, in the units of a target."""

    def __init__(self, model: Any, structure: Structure, measure: Measure) -> None:
        self.model, self.structure, self.measure = model, structure, measure
        self.prefix, blocks = decoder_blocks(model)
        self.whole = ModelShape(len(blocks), UnitCounts.of(structure))
        self._known: dict[ModelShape, float] = {}

    def __call__(self, shape: ModelShape) -> float:
        """Parameters, bytes, or the share of the whole model's time per token."""
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
        for part in structure.stream:
            sizes[part.parameter][part.axis] = shape.counts.width * part.entries.shape[1]
        return {name: tuple(size) for name, size in sizes.items()}

    def _latency(self, shape: ModelShape) -> float:
        smaller = first_of(self.model, self.structure, shape)
        pairs = [(_decode_seconds(smaller), _decode_seconds(self.model)) for _ in range(_ROUNDS)]
        return statistics.median(own / whole for own, whole in pairs)


def first_of(model: Any, structure: Structure, shape: ModelShape) -> Any:
    """A model of the shape, of whatever comes first: for what its numbers do not matter to."""
    counts = shape.counts
    prefix, blocks = decoder_blocks(model)
    if shape.layers < len(blocks):
        model = copy.deepcopy(model)
        keep_blocks(model, prefix, list(range(shape.layers)))
        structure = structure.of_blocks(prefix, list(range(shape.layers)))
    units = {s.reader: torch.arange(getattr(counts, s.kind)) for s in structure.sublayers}
    return slice_model(model, structure, counts, Kept(units, torch.arange(counts.width)))


def shapes_within(target: CostTarget, costs: Costs, multiple: int) -> list[ModelShape]:
    """Shapes that meet the target, at most `target.shapes`; each has as many neurons as it may.

    Raises:
        UserError: none does, or nothing has to be taken.
    """
    whole, limit = costs.whole, _limit(target, costs)
    if costs.measure != "latency" and costs(whole) <= limit:
        raise UserError(
            f"prune_structured.target.{target.measure}: the model is within {target.value:g} already; "
            "give a smaller number"
        )
    step = multiple if whole.counts.neurons % multiple == 0 else 1
    heads, layers = [whole.counts.heads], [whole.layers]
    if "heads" in target.take:
        able = [
            n
            for n in range(1, whole.counts.heads + 1)
            if possible(costs.model.config, costs.structure, _with(whole, heads=n).counts)
        ]
        heads = _down_to(able, lambda n: costs(_with(whole, heads=n)) <= limit)
    if "layers" in target.take:
        layers = _down_to(
            list(range(1, whole.layers + 1)), lambda n: costs(replace(whole, layers=n)) <= limit
        )
    found: list[ModelShape] = []
    for blocks in _spread(list(layers), target.shapes):
        for count in _spread(list(heads), target.shapes):
            shape = _with(ModelShape(blocks, whole.counts), heads=count)
            within = _most_neurons(shape, costs, limit, step, "neurons" in target.take)
            if within is not None:
                found.append(within)
    # of shapes that keep the same, the one with less of something else is no use
    found = [s for s in found if not any(_contains(other, s) for other in found if other != s)]
    found = [s for s in found if s.counts.neurons >= _LEAST * whole.counts.neurons] or found
    if not found:
        neurons = step if "neurons" in target.take else whole.counts.neurons
        least = ModelShape(min(layers), replace(whole.counts, heads=min(heads), neurons=neurons))
        raise UserError(
            f"prune_structured.target.{target.measure}: {target.value:g} cannot be met by taking "
            f"{', '.join(target.take)} (what is left costs {costs(least):g} at least); "
            "allow more in target.take, or give a larger number"
        )
    return _spread(found, target.shapes)


def best_shape(
    shapes: list[ModelShape],
    trial: Callable[[ModelShape, Tensor], Any],
    model: Any,
    windows: Tensor,
    target: CostTarget,
) -> tuple[ModelShape, dict[str, float]]:
    """The shape of the lowest KL from the model, and what each reached.

    Args:
        shapes: to try.
        trial: (shape, windows) -> a model of that shape pruned with these windows.
        model: the original.
        windows: calibration token ids (n, length); the last ones judge.
        target: how many windows.

    Raises:
        UserError: fewer windows than it takes.
    """
    need = target.fit_windows + target.judge_windows
    if len(shapes) == 1:
        return shapes[0], {}
    if len(windows) < need:
        raise UserError(
            f"prune_structured.target: {target.fit_windows} windows to fit and {target.judge_windows} to "
            f"judge are more than the {len(windows)} calibration windows; raise data.calibration_windows"
        )
    judged = windows[target.fit_windows : need]
    with torch.no_grad():
        wanted = [model(input_ids=w[None])[0].float().log_softmax(-1) for w in judged]
    losses = {}
    for shape in shapes:
        pruned = trial(shape, windows[: target.fit_windows])
        with torch.no_grad():
            found = [pruned(input_ids=w[None])[0].float().log_softmax(-1) for w in judged]
        parts = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(wanted, found, strict=True)]
        losses[shape] = float(torch.stack(parts).mean())
    best = min(losses, key=lambda shape: losses[shape])
    return best, {_label(shape): loss for shape, loss in losses.items()}


def _with(shape: ModelShape, **counts: int) -> ModelShape:
    return replace(shape, counts=replace(shape.counts, **counts))


def _down_to(numbers: list[int], enough: Callable[[int], bool]) -> list[int]:
    """Ascending numbers from the last down to the first that is enough by itself, or to the lowest."""
    last = next((number for number in reversed(numbers) if enough(number)), numbers[0])
    return [number for number in reversed(numbers) if number >= last]


def _most_neurons(shape: ModelShape, costs: Costs, limit: float, step: int, free: bool) -> ModelShape | None:
    """The shape with the most neurons, a multiple of `step`, that costs at most `limit`."""

    def at(multiple: int) -> ModelShape:
        return _with(shape, neurons=multiple * step)

    low, high = (1, shape.counts.neurons // step) if free else (shape.counts.neurons // step,) * 2
    if costs(at(high)) <= limit:
        return at(high)
    if costs(at(low)) > limit:
        return None
    while high - low > 1:  # low meets it, high does not
        middle = (low + high) // 2
        low, high = (middle, high) if costs(at(middle)) <= limit else (low, middle)
    return at(low)


def _limit(target: CostTarget, costs: Costs) -> float:
    """The target in the units of the costs."""
    if target.measure == "latency" or target.value > 1:
        return target.value
    return target.value * costs(costs.whole)


def _contains(larger: ModelShape, smaller: ModelShape) -> bool:
    """Whether one shape has at least as much of everything."""
    a, b = larger.counts, smaller.counts
    return larger.layers >= smaller.layers and a.heads >= b.heads and a.neurons >= b.neurons


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, the first and the last among them."""
    if len(items) <= count:
        return items
    if count == 1:
        return items[:1]
    return [items[(i * (len(items) - 1)) // (count - 1)] for i in range(count)]


def _label(shape: ModelShape) -> str:
    return f"{shape.layers} blocks, {shape.counts.heads} heads, {shape.counts.neurons} neurons"


@torch.no_grad()
def _decode_seconds(model: Any) -> float:
    """Median seconds of a decode step after a short prompt, batch 1, greedy on the same ids."""
    ids = torch.zeros(1, _PROMPT, dtype=torch.long, device=model.device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    seconds = []
    for _ in range(_STEPS):
        started = time.perf_counter()
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
