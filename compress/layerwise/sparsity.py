"""How many zeros each layer gets: alike, by outliers, or by what they cost at the model's output.

    uniform   every layer the same share.
    owl       blocks with more outliers stay denser (solvers/outliers.py).
    kl        every block is pruned alone at several shares around the asked one, and the KL of the model's
              output to the original's is measured (sensitivity.py); between the measured shares its logarithm
              is interpolated; an exact knapsack (solvers/knapsack.py) takes the shares of least summed KL.

Inside a block all layers get the block's share. However the shares come about, the zeros of all selected
layers together are exactly round(sparsity * weights), by largest remainder; where a carried mask removes more
from a layer than its share, the others lose less.

Cost: `owl` one forward pass over the calibration text; `kl` besides `measured_shares` times half a forward
pass per block over the measured tokens. Both need the whole model in memory.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from compress.calibration.magnitudes import input_statistics
from compress.errors import UserError
from compress.layerwise.sensitivity import Probe, replaced_weight
from compress.models.layers import matrix
from compress.models.running import Precision
from compress.models.stacks import decoder_blocks
from compress.solvers import outliers
from compress.solvers.knapsack import choose
from compress.solvers.masks import Quota, best, spread
from compress.solvers.wanda import scores
from compress.tasks.registry import task_of

_STEP = 0.01  # of the shares that the knapsack chooses from
_SPREADS = {"owl": 0.08, "kl": 0.15}
_FLOOR = 1e-12  # nats; the logarithm of a measured KL of 0

Score = Callable[[Tensor, Tensor], Tensor]  # of a weight (out, in) and squared input norms (in,)


class Sparsity(BaseModel):
    """How much becomes zero, and in which layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of the selected weights that becomes zero")
    pattern: str | None = Field(
        None, pattern=r"^[1-9][0-9]?:[1-9][0-9]?$", description="N:M, as 2:4; replaces `sparsity`"
    )
    select: tuple[str, ...] = Field(
        ("*",), min_length=1, description="wildcards of the linear layers to take"
    )
    skip: tuple[str, ...] = Field((), description="wildcards of those to leave dense")

    @model_validator(mode="after")
    def _removes_something(self) -> Self:
        if self.group is not None and self.group[0] >= self.group[1]:
            raise ValueError(f"pattern: '{self.pattern}' removes nothing; N must be less than M")
        return self

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) of the pattern."""
        if self.pattern is None:
            return None
        kept, of = map(int, self.pattern.split(":"))
        return kept, of


class ScopedSparsity(Sparsity):
    """How much becomes zero, of every layer or of all together."""

    scope: Literal["layer", "model"] = Field("layer", description="where the share holds")

    @model_validator(mode="after")
    def _one_of_scope_and_pattern(self) -> Self:
        if self.scope == "model" and self.pattern is not None:
            raise ValueError(
                f"pattern: '{self.pattern}' holds in every group of columns, scope: model has one threshold "
                "for all; give one of the two"
            )
        return self


class SparsityGoal(Sparsity):
    """How much becomes zero, and how layers share it: the fields of all one-shot unstructured pruning."""

    allocation: Literal["uniform", "owl", "kl"] = Field(
        "uniform", description="how blocks share the zeros: alike, by outlier ratio, or by measured KL"
    )
    spread: float | None = Field(
        None, gt=0, lt=1, description="of the blocks' shares to both sides; null: 0.08 for owl, 0.15 for kl"
    )
    measured_windows: int = Field(4, ge=1, description="of the calibration windows, for `kl`")
    measured_tokens: int = Field(128, ge=8, description="of each of them")
    measured_shares: int = Field(5, ge=2, le=33, description="at which a block's KL is measured")

    @model_validator(mode="after")
    def _leaves_something_to_share(self) -> Self:
        if self.pattern is not None and self.allocation != "uniform":
            raise ValueError(
                f"allocation: '{self.allocation}' has nothing to share out where every group keeps "
                f"{self.pattern}; use `sparsity`, or allocation: uniform"
            )
        return self


def check_goal(goal: SparsityGoal, model: Any, names: list[str]) -> list[str]:
    """The names; the model may be on the meta device.

    Raises:
        UserError: as `check_pattern`, or the zeros of an encoder-decoder are to be shared out.
    """
    if goal.allocation != "uniform" and task_of(model.config).stacks > 1:
        raise UserError(
            f"allocation: '{goal.allocation}' shares zeros out over one list of blocks, and an "
            "encoder-decoder has two; take uniform"
        )
    return check_pattern(goal, model, names)


def check_pattern(goal: Sparsity, model: nn.Module, names: list[str]) -> list[str]:
    """The names; the model may be on the meta device.

    Raises:
        UserError: a layer whose columns the pattern does not divide.
    """
    if goal.group is None:
        return names
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        columns = module.weight.shape[1]
        if columns % goal.group[1]:
            raise UserError(
                f"pattern: '{goal.pattern}' does not fit '{name}' with {columns} columns; put it into "
                "`skip`, or choose an M that divides them"
            )
    return names


def targets(
    goal: SparsityGoal,
    model: Any,
    names: list[str],
    masks: Mapping[str, Tensor],
    windows: Tensor,
    *,
    score: Score = scores,
    precision: Precision = "float32",
) -> dict[str, Quota]:
    """The target of every layer.

    Args:
        goal: what is asked for.
        model: in float; for `uniform` its weights may be on the meta device.
        names: of the layers that are pruned.
        masks: what is carried; it counts.
        windows: calibration token ids (n, length); `uniform` does not look at them.
        score: what `kl` prunes by while it measures.
        precision: of its forward passes.
    """
    if goal.group is not None:
        return dict.fromkeys(names, goal.group)
    modules = {name: model.get_submodule(name) for name in names}
    sizes = torch.tensor([module.weight.numel() for module in modules.values()])
    least = torch.tensor([int((~masks[name]).sum()) if name in masks else 0 for name in names])
    shares = None
    if goal.allocation != "uniform":
        blocks = _by_block(model, names)
        found = _owl if goal.allocation == "owl" else _kl
        measured = found(goal, model, blocks, windows, score, precision)
        share = {name: measured[block] for block, inside in blocks.items() for name in inside}
        shares = torch.tensor([share[name] for name in names], dtype=torch.float64)
    count = max(round(goal.sparsity * int(sizes.sum())), int(least.sum()))
    return dict(zip(names, spread(count, sizes, least, shares).tolist(), strict=True))


def _by_block(model: Any, names: list[str]) -> dict[int, list[str]]:
    """Number of a block -> the layers inside it."""
    prefix, blocks = decoder_blocks(model)
    inside = {i: [n for n in names if n.startswith(f"{prefix}.{i}.")] for i in range(len(blocks))}
    missing = set(names) - {name for layers in inside.values() for name in layers}
    if missing:
        raise UserError(
            f"allocation: '{min(missing)}' is not inside the blocks '{prefix}.*'; put it into `skip`"
        )
    return {number: layers for number, layers in inside.items() if layers}


def _norms(model: Any, blocks: dict[int, list[str]], windows: Tensor) -> dict[str, Tensor]:
    """Mean squares of the inputs of all layers."""
    names = [name for layers in blocks.values() for name in layers]
    seen = input_statistics(model, windows, names, samples=0)
    return {name: found.squares / found.count for name, found in seen.items()}


def _owl(
    goal: SparsityGoal, model: Any, blocks: dict[int, list[str]], windows: Tensor, score: Score, _: Precision
) -> dict[int, float]:
    del score  # the ratio is defined by Wanda's
    norms = _norms(model, blocks, windows)
    ratios, sizes = [], []
    for names in blocks.values():
        weights = {name: matrix(model.get_submodule(name)) for name in names}
        ratios.append(outliers.outlier_ratio([scores(w, norms[name]) for name, w in weights.items()]))
        sizes.append(sum(weight.numel() for weight in weights.values()))
    found = outliers.shares(ratios, sizes, goal.sparsity, goal.spread or _SPREADS["owl"])
    return dict(zip(blocks, found, strict=True))


def _kl(
    goal: SparsityGoal,
    model: Any,
    blocks: dict[int, list[str]],
    windows: Tensor,
    score: Score,
    precision: Precision,
) -> dict[int, float]:
    norms = _norms(model, blocks, windows)
    probe = Probe(model, windows[-goal.measured_windows :, : goal.measured_tokens], precision)
    reach = goal.spread or _SPREADS["kl"]
    low, high = max(goal.sparsity - reach, 0.0), min(goal.sparsity + reach, 0.99)
    measured = np.linspace(low, high, goal.measured_shares)
    candidates = np.unique(np.append(np.arange(low, high, _STEP), goal.sparsity))
    costs, losses = [], []
    for number, names in blocks.items():
        probe.advance(number)
        logarithms = [
            np.log(max(_block_loss(model, names, float(share), norms, score, probe), _FLOOR))
            for share in measured
        ]
        # more zeros cost more; where measuring says otherwise, that is noise
        losses.append(np.exp(np.interp(candidates, measured, np.maximum.accumulate(logarithms))).tolist())
        size = sum(model.get_submodule(name).weight.numel() for name in names)
        costs.append([size - round(float(share) * size) for share in candidates])
    even = int(np.searchsorted(candidates, goal.sparsity))
    chosen = choose(costs, losses, sum(row[even] for row in costs))
    return {number: float(candidates[k]) for number, k in zip(blocks, chosen, strict=True)}


def _block_loss(
    model: Any, names: list[str], share: float, norms: dict[str, Tensor], score: Score, probe: Probe
) -> float:
    """KL at the model's output with one block pruned."""
    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            weight = matrix(module)
            mask = best(score(weight, norms[name]), round(share * weight.numel()))
            stack.enter_context(replaced_weight(module, weight * mask))
        return probe.loss()
