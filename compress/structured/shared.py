"""Heads that go together in all blocks of a stack, since they share a table of relative positions (T5).

The table has a column per head, and one set of columns for all blocks, so that which heads go is one choice.
The heads of one number are one unit, and what they are worth is added up over the blocks: scores as they are
(structured/importance.py), what reconstruction loses as its error is (solvers/least_squares.py). Blocks are
seen as they were, before any of them loses something, as one walk must be over before the choice is made;
the readers are refitted in their turn. Cost: that walk over the calibration windows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.calibration.walk import walk
from compress.models.layers import matrix
from compress.models.running import Precision
from compress.solvers.least_squares import shared_removal_order
from compress.structured.importance import Importance, activation, magnitude
from compress.structured.structure import Sublayer


def shared_orders(
    model: Any,
    windows: Tensor,
    sublayers: Sequence[Sublayer],
    kept: Mapping[str, int],
    importance: Importance,
    scores: Mapping[str, Tensor],
    *,
    damping: float,
    batch: int | None,
    precision: Precision,
) -> dict[str, Tensor]:
    """Reader -> the order in which its units go, of those that share a table with others.

    Args:
        model: in float; stays as it is.
        windows: calibration token ids (n, length).
        sublayers: that lose units.
        kept: kind -> how many of a block stay.
        importance: how to choose.
        scores: reader -> (units,), for the importances that are known beforehand.
        damping: added to H, relative to its mean diagonal.
        batch: windows per forward pass; None: about 2048 tokens.
        precision: what the forward passes compute in.
    """
    groups: dict[str, list[Sublayer]] = {}
    for sublayer in sublayers:
        if sublayer.table is not None:
            groups.setdefault(sublayer.table, []).append(sublayer)
    groups = {table: group for table, group in groups.items() if len(group) > 1}
    moments: dict[str, Tensor] = {}
    if groups and importance in ("activation", "reconstruction"):
        names = [s.reader for group in groups.values() for s in group]
        for visit in walk(model, windows, names, batch=batch, precision=precision, what="weighing heads"):
            found = visit.covariance
            moments |= {name: found.hessian.clone() / found.count for name in visit.names}
    orders: dict[str, Tensor] = {}
    for group in groups.values():
        order = _order(model, group, kept[group[0].kind], importance, scores, moments, damping)
        orders |= {s.reader: order for s in group}
    return orders


def _order(
    model: Any,
    group: Sequence[Sublayer],
    count: int,
    importance: Importance,
    scores: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    damping: float,
) -> Tensor:
    """The units that go first, of a group."""
    if importance == "magnitude":
        parts = tuple(part for s in group for part in s.parts)
        return magnitude(model, parts).argsort(stable=True)
    if importance in ("taylor", "kl"):
        return torch.stack([scores[s.reader] for s in group]).sum(0).argsort(stable=True)
    weights = [matrix(model.get_submodule(s.reader)) for s in group]
    seen = [moments[s.reader] for s in group]
    columns = group[0].columns.to(weights[0].device)
    if importance == "activation":
        found = [activation(w, h, columns) for w, h in zip(weights, seen, strict=True)]
        return torch.stack(found).sum(0).argsort(stable=True)
    return shared_removal_order(weights, columns, seen, group[0].units - count, damping)
