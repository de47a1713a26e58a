"""A target that is met: how many heads, neurons and blocks may stay.

What a shape costs (structured/costs.py) falls with every count, so that for each number of heads and blocks
the most neurons that meet the target are found by bisection. These shapes cost the same; which is best is the
model's affair, so it is measured: each is pruned on a few calibration windows, and its KL from the original
on others decides (structured/judging.py), and whether that is more than may be lost.

Limits: shapes are compared on few windows, and a latency is that of the machine it was measured on.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.errors import UserError
from compress.structured.costs import Costs, Measure
from compress.structured.procedure import ModelShape
from compress.structured.slicing import possible

Dimension = Literal["neurons", "heads", "layers", "width"]
_LEAST = 0.25  # of the neurons: a shape with fewer is not tried while there are others


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
    largest_loss: float | None = Field(
        None,
        gt=0,
        description="KL from the original before healing, nats per token, beyond which there is no result; "
        "null: with latency half of what one answer to every text would lose, with others any",
    )
    take: tuple[Dimension, ...] = Field(
        ("neurons", "heads"),
        min_length=1,
        description="what may be taken; width: with heads, where a configuration derives it from them (BERT)",
    )
    shapes: int = Field(4, ge=1, le=64, description="shapes that are tried out; 1: neurons first")
    fit_windows: int = Field(2, ge=1, description="calibration windows to prune a shape with")
    judge_windows: int = Field(1, ge=1, description="other calibration windows to judge it on")

    @model_validator(mode="after")
    def _width_goes_with_heads(self) -> "CostTarget":
        if "width" in self.take and "heads" not in self.take:
            raise ValueError("take: width goes with heads; allow both, or neither")
        return self

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

    @property
    def bounded(self) -> bool:
        """Whether a shape may lose only so much."""
        return self.largest_loss is not None or self.measure == "latency"


class Unmet(UserError):
    """No shape meets the target; `least` is the smallest there is."""

    def __init__(self, message: str, least: ModelShape) -> None:
        super().__init__(message)
        self.least = least


def shapes_within(
    target: CostTarget, costs: Costs, multiple: int, value: float | None = None
) -> list[ModelShape]:
    """Shapes that meet the target, at most `target.shapes`; each has as many neurons as it may.

    Args:
        target: what is wanted.
        costs: of shapes.
        multiple: that neurons stay a multiple of.
        value: in the place of the target's own.

    Raises:
        Unmet: none does.
        UserError: nothing has to be taken.
    """
    whole, limit = costs.whole, _limit(target.value if value is None else value, costs)
    if costs.measure != "latency" and costs(whole) <= limit:
        raise UserError(
            f"prune_structured.target.{target.measure}: the model is within {target.value:g} already; "
            "give a smaller number"
        )
    step = multiple if whole.counts.neurons % multiple == 0 else 1
    heads, layers = [whole.counts.heads], [max(whole.blocks)]
    if "heads" in target.take:
        able = [n for n in range(1, whole.counts.heads + 1) if with_heads(target, costs, n) is not None]
        heads = _down_to(able, lambda n: costs(with_heads(target, costs, n) or whole) <= limit)
    if "layers" in target.take:
        layers = _down_to(
            list(range(1, max(whole.blocks) + 1)), lambda n: costs(whole.with_layers(n)) <= limit
        )
    found: list[ModelShape] = []
    for blocks in spread(list(layers), target.shapes):
        for count in spread(list(heads), target.shapes):
            shape = (with_heads(target, costs, count) or whole).with_layers(blocks)
            within = _most_neurons(shape, costs, limit, step, "neurons" in target.take)
            if within is not None:
                found.append(within)
    # of shapes that keep the same, the one with less of something else is no use
    found = [s for s in found if not any(_contains(other, s) for other in found if other != s)]
    found = [s for s in found if s.counts.neurons >= _LEAST * whole.counts.neurons] or found
    if not found:
        neurons = step if "neurons" in target.take else whole.counts.neurons
        fewest = with_heads(target, costs, min(heads)) or whole
        least = with_counts(fewest.with_layers(min(layers)), neurons=neurons)
        raise Unmet(
            f"prune_structured.target.{target.measure}: {target.value:g} cannot be met by taking "
            f"{', '.join(target.take)} (what is left costs {costs(least):g} at least); "
            "allow more in target.take, or give a larger number",
            least,
        )
    return spread(found, target.shapes)


def with_heads(target: CostTarget, costs: Costs, heads: int) -> ModelShape | None:
    """The whole model with so many heads, and the width that goes with them; None where it cannot be said."""
    whole = costs.whole
    shape = with_counts(whole, heads=heads)
    if possible(costs.model.config, costs.structure, shape.counts):
        return shape
    if "width" in target.take:
        shape = with_counts(shape, width=whole.counts.width // whole.counts.heads * heads)
        if possible(costs.model.config, costs.structure, shape.counts):
            return shape
    return None


def with_counts(shape: ModelShape, **counts: int) -> ModelShape:
    """The shape with other counts."""
    return replace(shape, counts=replace(shape.counts, **counts))


def _down_to(numbers: list[int], enough: Callable[[int], bool]) -> list[int]:
    """Ascending numbers from the last down to the first that is enough by itself, or to the lowest."""
    last = next((number for number in reversed(numbers) if enough(number)), numbers[0])
    return [number for number in reversed(numbers) if number >= last]


def _most_neurons(shape: ModelShape, costs: Costs, limit: float, step: int, free: bool) -> ModelShape | None:
    """The shape with the most neurons, a multiple of `step`, that costs at most `limit`."""

    def at(multiple: int) -> ModelShape:
        return with_counts(shape, neurons=multiple * step)

    low, high = (1, shape.counts.neurons // step) if free else (shape.counts.neurons // step,) * 2
    if costs(at(high)) <= limit:
        return at(high)
    if costs(at(low)) > limit:
        return None
    while high - low > 1:  # low meets it, high does not
        middle = (low + high) // 2
        low, high = (middle, high) if costs(at(middle)) <= limit else (low, middle)
    return at(low)


def _limit(value: float, costs: Costs) -> float:
    """A target in the units of the costs."""
    if costs.measure == "latency" or value > 1:
        return value
    return value * costs(costs.whole)


def _contains(larger: ModelShape, smaller: ModelShape) -> bool:
    """Whether one shape has at least as much of everything."""
    a, b = larger.counts, smaller.counts
    blocks = all(x >= y for x, y in zip(larger.blocks, smaller.blocks, strict=True))
    return blocks and a.heads >= b.heads and a.neurons >= b.neurons


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, the first and the last among them."""
    if len(items) <= count:
        return items
    if count == 1:
        return items[:1]
    return [items[(i * (len(items) - 1)) // (count - 1)] for i in range(count)]
