"""Which of some shapes loses least, and whether that is little enough.

A shape is judged by what it makes of the model: pruned on a few calibration windows, KL from the original on
others, in nats per token, before any healing; a model with labels on labelled training texts, one that embeds
by 1 - cosine (structured/probes.py). The scale of it is the loss of a model that gives one answer to every
text, the mean of the original's: KL(p || mean p) over the same positions, all that the original knows of a
context. With a latency, half of that is the bound where none is given. Where no shape that meets a
target keeps the loss below its bound, the answer is the curve of what can be had: shapes between the whole
model and that one, with both numbers.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.structured.costs import Costs
from compress.structured.probes import Prober, answer, distance, one_answer, unit
from compress.structured.procedure import ModelShape
from compress.structured.slicing import possible
from compress.structured.target import CostTarget, Unmet, shapes_within, with_counts
from compress.tasks.registry import task_of

_TRIES = 4
_SLACK = 1.03  # a time that is timed again comes out so much larger at most
_KEPT = 0.5  # of all that the original knows of a context may be lost
_POINTS = (0.25, 0.5, 0.75, 1.0)  # of the way from the whole model

# (shape, windows) -> a model of that shape pruned with these windows
Trial = Callable[[ModelShape, Tensor], Any]


class Judge:
    """KL from the original, or what stands for it, shape by shape."""

    def __init__(
        self, trial: Trial, model: Any, windows: Tensor, target: CostTarget, prober: Prober | None = None
    ) -> None:
        """See the module's text; `windows` are calibration token ids (n, length), the last ones judge.

        Raises:
            UserError: fewer windows than it takes.
        """
        prober = prober or Prober()
        fit, judged = (
            prober.windows_for(model, count, windows.shape[1])
            for count in (target.fit_windows, target.judge_windows)
        )
        if len(windows) < fit + judged:
            raise UserError(
                f"prune_structured.target: {fit} windows to fit and {judged} to "
                f"judge are more than the {len(windows)} calibration windows; raise data.calibration_windows"
            )
        self.trial, self.task = trial, task_of(model.config)
        self.fit = windows[:fit]
        self.judged = prober.texts(model, windows[fit : fit + judged], last=True)
        self.known: dict[ModelShape, float] = {}
        self.unit = unit(self.task)
        with torch.no_grad():
            self._wanted = [answer(model, text) for text in self.judged]  # (rows, k) each
        scale = one_answer(self.task, self._wanted)
        self.bound = _KEPT * scale if target.largest_loss is None else target.largest_loss

    @torch.no_grad()
    def __call__(self, shape: ModelShape) -> float:
        """Mean nats per token, or in the task's unit."""
        if shape not in self.known:
            pruned = self.trial(shape, self.fit)
            pairs = zip(self._wanted, self.judged, strict=True)
            parts = [distance(self.task, wanted, answer(pruned, text)) for wanted, text in pairs]
            self.known[shape] = statistics.fmean(parts)
        return self.known[shape]


def shape_for(
    target: CostTarget, costs: Costs, multiple: int, judge: Callable[[], Judge]
) -> tuple[ModelShape, dict[str, Any]]:
    """The shape that meets the target and loses least, and notes that tell what was measured.

    Args:
        target: what is wanted.
        costs: of shapes.
        multiple: that neurons stay a multiple of.
        judge: made when it is needed.

    Raises:
        UserError: none meets it, or what does loses more than it may.
    """
    value, bounded = target.value, target.bounded
    for _ in range(_TRIES):
        try:
            shapes = shapes_within(target, costs, multiple, value)
        except Unmet as error:
            if target.measure == "latency":
                raise _refusal(str(error), error.least, costs, judge() if bounded else None) from None
            raise
        tried: dict[str, float] = {}
        best = shapes[0]
        if len(shapes) > 1 or bounded:
            judged = judge()
            losses = {shape: judged(shape) for shape in shapes}
            best = min(losses, key=lambda shape: _or_infinity(losses[shape]))
            tried = {_label(shape): loss for shape, loss in losses.items()}
            if bounded and not losses[best] <= judged.bound:
                raise _refusal(
                    f"prune_structured.target.{target.measure}: what meets {target.value:g} ({_label(best)}) "
                    f"loses {losses[best]:.2g} {judged.unit}, beyond largest_loss {judged.bound:.3g}; "
                    f"give a larger {target.measure}, or a larger largest_loss and heal",
                    best,
                    costs,
                    judged,
                )
        found: dict[str, Any] = {"measure": target.measure, "wanted": target.value}
        if bounded:
            found |= {"largest_loss": judged.bound, "loss": losses[best]}
        if target.measure != "latency":
            found["reached"] = costs(best) / (costs(costs.whole) if target.value <= 1 else 1)
            return best, {"target": found, "kl_of_shapes_tried": tried}
        rounds = costs.again(best)
        found["reached"] = costs(best)
        found["quartiles"] = statistics.quantiles(rounds, n=4)[::2]
        found["measured"] = (
            f"{costs.timed} in torch, float32, batch 1, as a share of the whole model's seconds"
        )
        if found["reached"] <= target.value * _SLACK:
            return best, {"target": found, "kl_of_shapes_tried": tried}
        value *= target.value / found["reached"]  # it was taken because its time came out low by chance
    raise _refusal(
        f"prune_structured.target.latency: {target.value:g} was met while searching, and not when timed "
        f"again ({found['reached']:.3g}); wait until the machine is quiet, or give another",
        best,
        costs,
        judged,
    )


def _refusal(message: str, least: ModelShape, costs: Costs, judge: Judge | None) -> UserError:
    """An error that ends in what can be had between the whole model and `least`."""
    points = []
    for shape in _between(costs, least):
        loss = "" if judge is None else f" for {judge(shape):.2g} {judge.unit.partition(' per ')[0]}"
        points.append(f"{_cost(costs, shape)}{loss} ({_label(shape)})")
    return UserError(f"{message}. What can be had: " + ", ".join(points))


def _between(costs: Costs, least: ModelShape) -> list[ModelShape]:
    """Shapes on the way from the whole model to the least, that one included."""
    whole = costs.whole
    found: list[ModelShape] = []
    for part in _POINTS:

        def at(most: int, fewest: int, part: float = part) -> int:
            return round(most + part * (fewest - most))

        heads = at(whole.counts.heads, least.counts.heads)
        while not possible(costs.model.config, costs.structure, with_counts(whole, heads=heads).counts):
            heads += 1  # the whole model's are possible
        neurons = at(whole.counts.neurons, least.counts.neurons)
        blocks = (at(most, fewest) for most, fewest in zip(whole.blocks, least.blocks, strict=True))
        layers, *others = blocks
        counts = with_counts(whole, heads=heads, neurons=neurons).counts
        shape = ModelShape(layers, counts, *others)
        if shape not in (whole, least, *found) and part < 1:
            found.append(shape)
    return [*found, least]


def _cost(costs: Costs, shape: ModelShape) -> str:
    cost = costs(shape)
    return f"{cost:.2f}" if costs.measure == "latency" else f"{cost:,.0f}"


def _or_infinity(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _label(shape: ModelShape) -> str:
    blocks = " and ".join(map(str, shape.blocks))
    return f"{blocks} blocks, {shape.counts.heads} heads, {shape.counts.neurons} neurons"
