"""Prune linear layers in the order in which they run, each by the inputs that the pruned ones before it give.

Per group of layers with the same input:
    1. the target moves part of the way to what the original model computed (target.py);
    2. a solver chooses what goes and what the rest becomes, with as many zeros as sparsity.py says;
    3. the new weights take part in everything that is visited later.
The passes that use this differ in the solver.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compress.artifact.bundle import Bundle
from compress.artifact.masks import StoredMasks, kept_zeros, stored_masks
from compress.artifact.shards import ShardReader
from compress.calibration.walk import walk
from compress.context import Context
from compress.errors import about
from compress.layerwise.sparsity import SparsityGoal, targets
from compress.layerwise.target import Aim, Correction, aim_of
from compress.models.layers import matrix, put_weight
from compress.solvers.gptq import output_error
from compress.solvers.masks import Quota

# a target weight (out, in), how sparse, the mask it carries -> the new weight and its mask
Prune = Callable[[Tensor, Quota, Tensor | None], tuple[Tensor, Tensor]]


def sparsify(
    bundle: Bundle,
    context: Context,
    names: list[str],
    goal: SparsityGoal,
    correction: Correction,
    solver: Callable[[Aim], Prune],
    what: str,
) -> Bundle:
    """A pruned copy of a bundle.

    Args:
        bundle: in float; its blocks may be in files, and are then taken one at a time.
        context: lends calibration windows, device, precision.
        names: of the linear layers to prune, inside the blocks.
        goal: how many zeros, and where.
        correction: the settings of the target.
        solver: from what layers with the same input share to the solver of one of them.
        what: the label of the progress bar.

    Returns:
        The bundle, with masks and notes: those of `counts`; `mean_output_error` and `worst_output_error`
        (relative, against the outputs of the target); `mean_share` of the asymmetric target; `raised_damping`
        of layers that needed more.

    Raises:
        UserError: as `targets` and `walk`.
    """
    result = bundle.clone()
    store = result.offload(context.workdir / "parts", whole=goal.allocation != "uniform")
    model = result.model if store else result.model.to(context.device)
    windows = torch.from_numpy(context.data.calibration.tokens).long()
    goals = targets(goal, model, names, bundle.masks, windows, precision=context.precision)
    masks: dict[str, Tensor] = {}
    bits = bundle.masks.bits if isinstance(bundle.masks, StoredMasks) else {}
    bits = {name: found for name, found in bits.items() if name not in names}
    zeros: dict[str, tuple[int, int]] = {}
    errors: dict[str, float] = {}
    shares: list[float] = []
    raised: dict[str, float] = {}
    for visit in walk(
        model,
        windows,
        names,
        both_streams=correction.asymmetric != 0,
        residual=correction.residual,
        heldout=correction.heldout(windows),
        batch=correction.batch,
        precision=context.precision,
        store=store,
        what=what,
    ):
        modules = [model.get_submodule(name) for name in visit.names]
        weights = [matrix(module) for module in modules]
        aim = aim_of(weights, visit, correction, 1 if goal.group is None else goal.group[1])
        prune = solver(aim)
        parts = aim.weight.split([len(weight) for weight in weights])
        for name, module, part in zip(visit.names, modules, parts, strict=True):
            carried = bundle.masks.get(name)
            with about(name):
                values, mask = prune(part, goals[name], None if carried is None else carried.to(part.device))
            errors[name] = output_error(part, values, aim.hessian)
            put_weight(module, values)
            zeros[name] = int((~mask).sum()), mask.numel()
            if store is None:
                masks[name] = mask.cpu()
            elif (found := kept_zeros(mask, values)) is not None:
                bits[name] = found.cpu()
        if aim.share is not None:
            shares.append(aim.share)
        if aim.raised is not None:
            raised[visit.names[0]] = aim.raised
        del visit, modules, weights, parts, aim, prune  # they need not lie beside the next ones
    notes: dict[str, Any] = {
        **counts(zeros),
        "mean_output_error": sum(errors.values()) / len(errors),
        "worst_output_error": max(errors.items(), key=lambda item: item[1]),
        "raised_damping": raised,
    }
    if shares:
        notes["mean_share"] = sum(shares) / len(shares)
    if store is None:
        model.to("cpu")
        return result.evolve(masks={**bundle.masks, **masks}, notes=notes, shards=None)
    store.load_rest()
    written = ShardReader(store.parts)  # another pass may go on from there
    kept = stored_masks(model, written, dict.fromkeys((*bundle.masks, *names)), bits)
    return result.evolve(masks=kept, notes=notes, shards=written, parts=tuple(store.parts))


def counts(zeros: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """What pruning passes note: `removed` of how many weights, `sparsity`, and its range over layers.

    `zeros` are layers' counts of zeros and of weights.
    """
    removed, total = (sum(column) for column in zip(*zeros.values(), strict=True))
    layers = [removed / weights for removed, weights in zeros.values()]
    return {
        "removed": removed,
        "of": total,
        "sparsity": removed / total,
        "layer_sparsity": [min(layers), max(layers)],
    }
