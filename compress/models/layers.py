"""The layers of a model that multiply by a stored matrix: found, selected by name, read, replaced."""

import copy
import fnmatch
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.stacks import block_lists

_MULTIPLIES: dict[type[nn.Module], bool] = {nn.Linear: True}  # by class, once asked


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a stored matrix (out, in), adds its bias, and does no more.

    A class made of `nn.Linear` may do more (choose experts, round its input): it is tried.
    """
    if not isinstance(module, nn.Linear):
        return False
    kind = type(module)
    if kind not in _MULTIPLIES:
        _MULTIPLIES[kind] = kind.forward is nn.Linear.forward or _multiplies(module)
    return _MULTIPLIES[kind]


def _multiplies(module: nn.Linear) -> bool:
    """Whether a module, given made-up weights, does what `nn.Linear` does."""
    tried = copy.copy(module)  # beside which the model keeps its own, and may be without data
    source = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.randn(like.shape, generator=source), requires_grad=False)

    tried._parameters = {n: None if p is None else drawn(p) for n, p in module._parameters.items()}
    x = torch.randn(3, tried.in_features, generator=source)
    with torch.no_grad():
        try:
            found = tried(x)
        except Exception:  # it wants more than an input
            return False
        expected = nn.functional.linear(x, tried.weight, tried.bias)
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=1e-4, atol=1e-3)
    )


def linear_layers(
    model: nn.Module, select: tuple[str, ...] = ("*",), skip: tuple[str, ...] = ()
) -> list[str]:
    """Names of the linear layers inside the decoder or encoder blocks that the patterns select.

    Patterns are shell wildcards over full module names (`*.mlp.*`), or `re:` and a regular expression.
    The head is no block layer: quantizers treat it together with the embedding it may be tied to. An
    encoder's pooler lies outside the blocks, too, and stays as it is.
    """
    return selected(model, is_linear, select, skip)


def selected(
    model: nn.Module, wanted: Callable[[nn.Module], bool], select: tuple[str, ...], skip: tuple[str, ...]
) -> list[str]:
    """Names of the wanted modules inside the blocks that the patterns of `linear_layers` select."""
    blocks = block_lists(model)
    return [
        name
        for name, module in model.named_modules()
        if wanted(module)
        and name.startswith(blocks)
        and any(matches(name, p) for p in select)
        and not any(matches(name, p) for p in skip)
    ]


def matches(name: str, pattern: str) -> bool:
    """Whether a module name fits a pattern: shell wildcards, or `re:` and a regular expression.

    >>> matches("model.layers.0.mlp.up_proj", "*.mlp.*")
    True
    >>> matches("model.layers.0.mlp.up_proj", "re:layers\\\\.[1-9]")
    False
    """
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise UserError(f"select: '{pattern}' is no regular expression ({error})") from None
    return fnmatch.fnmatchcase(name, pattern)


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), float32."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def put_weight(module: nn.Module, values: Tensor) -> None:
    """Give a linear layer the weight `values` (out, in), in its own memory."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(values)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place that `name` has in `model`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
