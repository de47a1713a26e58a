"""Weights are numbers: a NaN or an infinity among them is refused by the tensor's name.

Solvers that sort, round or clip turn it into finite numbers, so that what comes out no longer shows that the
model was broken. It is looked for where weights are read and written, and before and after a pass that is
called from Python. Cost: one pass over the memory, the smallest and the largest value of each tensor.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from compress.errors import UserError

DAMAGED = "the checkpoint is damaged, or its training had broken; copy or download it again"
BROKEN = "what was done to it broke it; leave it out, or choose milder settings"
_OF_WEIGHTS = ("scales", "values", "activation_bounds")  # buffers of layers of codes, or without zeros


def require_finite(tensors: Iterable[tuple[str, Tensor]], place: object, advice: str = DAMAGED) -> None:
    """Refuse tensors that hold NaN or infinity.

    Args:
        tensors: by name; those without data, and those of integers, are passed over.
        place: where they come from, or which pass made them.
        advice: what to do.

    Raises:
        UserError: names the first that does.
    """
    for name, tensor in tensors:
        if _is_finite(tensor):
            continue
        wrong = int((~tensor.detach().float().isfinite()).sum())
        what = "NaN or infinite"
        raise UserError(f"{place}: {wrong} of the {tensor.numel()} values of '{name}' are {what}; {advice}")


def numbers_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What must be finite in a model: parameters, and buffers that are stored with them (scales of codes).

    Another buffer may hold -inf, which a mask of attention does.
    """
    yield from model.named_parameters()
    stored = {id(t) for t in model.state_dict(keep_vars=True).values()}
    for name, buffer in model.named_buffers():
        if id(buffer) in stored and not _is_finite(buffer):
            weighs = name.rpartition(".")[2] in _OF_WEIGHTS
            yield name, buffer if weighs else torch.where(buffer == -torch.inf, 0.0, buffer)


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return True
    low, high = tensor.detach().aminmax()  # either is NaN where any value is
    return bool(low.isfinite() and high.isfinite())
