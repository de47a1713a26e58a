"""Which parameters learn, and how fast: frozen and slower modules, named by wildcards.

A pattern that fits a module takes every parameter inside it. A parameter that several modules share (tied
embeddings) is taken when any of them is. Where several `slower` entries fit, the last one decides.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from compress.errors import UserError, nearest
from compress.models.layers import matches


class Slower(BaseModel):
    """Modules that learn at a rate of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modules: str = Field(min_length=1, description="wildcards of module names")
    factor: float = Field(ge=0, le=100, description="times the learning rate")


def chosen(model: nn.Module, pattern: str) -> set[str]:
    """Names of the parameters inside the modules that a pattern fits, shared ones under their first name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]
        for name, module in model.named_modules()
        if matches(name, pattern)
        for parameter in module.parameters()
    }


def factors(model: nn.Module, slower: tuple[Slower, ...]) -> dict[str, float]:
    """Parameter name -> factor on its learning rate, for those that have one."""
    return {name: entry.factor for entry in slower for name in sorted(chosen(model, entry.modules))}


@contextmanager
def frozen(model: nn.Module, patterns: tuple[str, ...], others: Collection[str] = ()) -> Iterator[None]:
    """Keep the chosen parameters, and others by name, as they are while the block runs."""
    names = {*others, *(name for pattern in patterns for name in chosen(model, pattern))}
    held = [p for name, p in model.named_parameters() if name in names and p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def check(model: nn.Module, freeze: tuple[str, ...], slower: tuple[Slower, ...]) -> None:
    """Refuse a pattern that fits no module, and freezing everything.

    Raises:
        UserError: in one line, with the nearest name.
    """
    patterns = [("freeze", p) for p in freeze] + [("slower", s.modules) for s in slower]
    for field, pattern in patterns:
        if not chosen(model, pattern):
            known = [name for name, module in model.named_modules() if any(True for _ in module.parameters())]
            raise UserError(f"{field}: '{pattern}' fits no module; {nearest(pattern, known[1:])}")
    names = {name for pattern in freeze for name in chosen(model, pattern)}
    if names == {name for name, _ in model.named_parameters()}:
        raise UserError(f"freeze: {list(freeze)} leaves nothing to train; name fewer modules")
