"""Which share of a model's weights lies in given modules, counted; and where the others are.

Weights are parameters of two and more dimensions, and codes; what is tied counts once. Experts that
`transformers` keeps as one parameter of three dimensions are no linear layers: who looks for those passes
them over, and most of the model with them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any, NamedTuple

from torch import nn


class Share(NamedTuple):
    """Weights that were taken, all that there are, and how many are left in what, the most first.

    Names in `left` have `*` for a block's number; those of parameters with more dimensions than a matrix end
    in `(3-D)`.
    """

    taken: int
    weights: int
    left: dict[str, int]


def share_of(model: nn.Module, modules: Iterable[str]) -> Share:
    """The share of the weights of `model`, which may be without data, in `modules` and what they hold."""
    within = tuple(f"{name}." for name in modules)
    names: dict[int, list[str]] = {}
    sizes: dict[int, tuple[int, ...]] = {}
    for name, holder, shape in _weights(model):
        names.setdefault(holder, []).append(name)
        sizes[holder] = shape
    taken, left = 0, Counter[str]()
    for holder, shape in sizes.items():
        if any(name.startswith(within) for name in names[holder]):
            taken += prod(shape)
        else:
            where = re.sub(r"\.\d+(?=\.)", ".*", names[holder][0])
            left[where if len(shape) == 2 else f"{where} ({len(shape)}-D)"] += prod(shape)
    return Share(taken, taken + sum(left.values()), dict(left.most_common()))


def _weights(model: nn.Module) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Name, identity and shape of every weight, under each name that it has."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim > 1:
            yield name, id(parameter), tuple(parameter.shape)
    for name, module in model.named_modules(remove_duplicate=False):
        shape: Any = getattr(module, "shape", None)  # of a module of codes, which has no parameters
        if isinstance(shape, tuple) and not any(True for _ in module.parameters()):
            yield name, id(module), shape
