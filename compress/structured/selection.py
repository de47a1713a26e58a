"""Which units go, block by block, and the readers refitted to those that stay.

Per reader (o_proj, down_proj), its inputs taken through the blocks already pruned:

    1. the units of the lowest score go: a score known beforehand (importance.py), or one of these inputs;
    2. what is left is refitted to give what the whole layer gave, moved part of the way to what it gave in
       the original model, with the drift of the stream made good (solvers/least_squares.py, asymmetric.py).

Where readers aim at the original model, those that lose nothing are refitted, too: what went before them has
moved the stream, and heads that go alone would otherwise leave every MLP to answer inputs it does not know.

Where the heads of several blocks share a table of relative positions (T5), they go together, by what all of
them are worth in the original model (structured/shared.py); all else is as above.

The columns that went are zero for the rest of the walk, so that the model runs in its old shape as the
smaller one will, until slicing.py makes that one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.calibration.moments import Covariance
from compress.calibration.walk import walk
from compress.models.layers import matrix, put_weight
from compress.models.running import Precision
from compress.solvers.least_squares import refit, removal_order
from compress.structured.importance import Importance, activation, magnitude
from compress.structured.shared import shared_orders
from compress.structured.structure import Structure, Sublayer

_BATCHES = 128  # in so many steps neurons are taken away


class Refit(BaseModel):
    """How readers are refitted: the field `refit` of prune_structured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asymmetric: float = Field(
        1.0, ge=0, le=1, description="share of the way to what the original model computed; 0: imitate itself"
    )
    residual: bool = Field(True, description="make good the drift of the residual stream, too")
    damping: float = Field(0.01, gt=0, le=1, description="added to H, relative to its mean diagonal")
    batch: int | None = Field(
        None, ge=1, le=1024, description="calibration windows per forward pass; null: about 2048 tokens"
    )


@dataclass
class Selection:
    """Reader -> the units that stay, ascending; and the relative error of its output, if it lost some."""

    units: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def select(
    model: Any,
    windows: Tensor,
    structure: Structure,
    kept: Mapping[str, int],
    importance: Importance,
    scores: Mapping[str, Tensor],
    refitting: Refit | None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    precision: Precision = "float32",
) -> Selection:
    """Choose and refit, in place: what goes is zero in its reader, whose other weights change.

    Args:
        model: in float.
        windows: calibration token ids (n, length).
        structure: its units.
        kept: kind -> how many units of each block stay.
        importance: how to choose.
        scores: reader -> (units,), for the importances that are known beforehand.
        refitting: None leaves the weights that stay as they are.
        masks: module name -> bool (out, in); False stays exactly zero.
        precision: what the forward passes compute in.

    Returns:
        All units of the sublayers that lose nothing, and those that stay of the others.
    """
    result = Selection({s.reader: torch.arange(s.units) for s in structure.sublayers})
    fewer = {s.reader: s for s in structure.sublayers if kept[s.kind] < s.units}
    if not fewer:
        return result
    settings = refitting or Refit()
    orders = shared_orders(
        model, windows, list(fewer.values()), kept, importance, scores,
        damping=settings.damping, batch=settings.batch, precision=precision,
    )  # fmt: skip
    if refitting is None and importance in ("magnitude", "taylor", "kl"):  # no statistic is needed
        for name, sublayer in fewer.items():
            score = scores[name] if name in scores else magnitude(model, sublayer.parts)
            order = orders.get(name, score.argsort(stable=True))
            _keep(model, sublayer, kept[sublayer.kind], order, result)
        return result
    aims = refitting is not None and settings.asymmetric > 0
    visited = {s.reader: s for s in structure.sublayers} if aims else fewer
    for visit in walk(
        model,
        windows,
        list(visited),
        both_streams=aims,
        residual=settings.residual,
        batch=settings.batch,
        precision=precision,
        what="pruning",
    ):
        for name in visit.names:
            sublayer = visited[name]
            mask = (masks or {}).get(name)
            _prune(model, sublayer, kept[sublayer.kind], visit.covariance, importance, scores, refitting,
                   mask, result, orders.get(name))  # fmt: skip
        del visit
    return result


def _prune(
    model: Any,
    sublayer: Sublayer,
    count: int,
    seen: Covariance,
    importance: Importance,
    scores: Mapping[str, Tensor],
    refitting: Refit | None,
    mask: Tensor | None,
    result: Selection,
    order: Tensor | None,
) -> None:
    """One reader; `order`: in which its units go, where that is settled."""
    reader = model.get_submodule(sublayer.reader)
    weight, hessian = matrix(reader).clone(), seen.hessian / seen.count
    columns = sublayer.columns.to(weight.device)
    settings = refitting or Refit()
    gone = sublayer.units - count
    if order is not None:
        pass
    elif importance == "reconstruction":
        batch = max(1, sublayer.units // _BATCHES)
        order = removal_order(weight, columns, hessian, gone, settings.damping, batch)
    else:
        score = scores.get(sublayer.reader)
        if importance == "magnitude":
            score = magnitude(model, sublayer.parts)
        elif importance == "activation":
            score = activation(weight, hessian, columns)
        assert score is not None, importance
        order = score.argsort(stable=True)[:gone]
    kept = _keep(model, sublayer, count, order, result)
    new = matrix(reader).clone()
    if refitting is not None:
        aim = seen.aim(weight)
        if aim is not None:
            aim.mul_(settings.asymmetric / seen.count)
        allowed = None if mask is None else mask.to(kept.device)[:, kept]
        new[:, kept] = refit(weight, kept, hessian, aim, settings.damping, allowed)
    if gone:
        lost = weight - new
        energy = float(((weight @ hessian) * weight).sum())
        result.errors[sublayer.reader] = float(((lost @ hessian) * lost).sum()) / max(energy, 1e-30)
    put_weight(reader, new)


@torch.no_grad()
def _keep(model: Any, sublayer: Sublayer, count: int, order: Tensor, result: Selection) -> Tensor:
    """Make the columns zero that go first in the order; those that stay, ascending."""
    reader = model.get_submodule(sublayer.reader)
    stays = torch.ones(sublayer.units, dtype=torch.bool)
    stays[order[: sublayer.units - count].cpu()] = False
    columns = sublayer.columns[stays].flatten().sort().values.to(reader.weight.device)
    gone = sublayer.columns[~stays].flatten().to(reader.weight.device)
    reader.weight.index_fill_(1, gone, 0.0)
    result.units[sublayer.reader] = stays.nonzero()[:, 0]
    return columns
