"""How deep in a model its parameters lie: what learns at all, when it begins to, and how fast.

Of N blocks the first has the level 1 and the last N, an encoder's before its decoder's. What is called before
the first block, the embeddings, has 0; what is called after the last, norms and heads, N + 1; what is called
between two stacks has that of the block before it. What several modules share counts as the deepest of them:
a head that is tied to the embeddings goes with these.

    layer decay     rate times d^(N + 1 - level): heads learn at the whole rate, embeddings at d^(N + 1) of it
                    (Howard & Ruder 2018, arXiv 1801.06146; Clark et al. 2020, arXiv 2003.10555)
    unfreezing      over a share u of the steps, S = u steps of them, the level l < N + 1 begins to learn at
                    step S (N + 1 - l) / (N + 1): heads at once, embeddings last (Howard & Ruder 2018)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.errors import UserError
from compress.models.running import device_of, evaluating
from compress.models.stacks import block_names
from compress.tasks.registry import task_of


def levels(model: Any) -> dict[str, int]:
    """Parameter name -> level, 0 .. blocks + 1.

    The model is called once, on two tokens, to see what comes before the blocks and what after; it may hold
    no data.
    """
    blocks = {model.get_submodule(name): number for number, name in enumerate(block_names(model), 1)}
    top = len(blocks) + 1
    found: dict[int, int] = {}
    for block, level in blocks.items():
        found |= {id(parameter): level for parameter in block.parameters()}
    inside = set(found)
    reached = 0

    def note(module: nn.Module, _: Any) -> None:
        nonlocal reached
        reached = blocks.get(module, reached)
        level = top if reached == top - 1 else reached
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in inside:
                found[id(parameter)] = min(level, found.get(id(parameter), level))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    tokens = torch.ones(1, 2, dtype=torch.int64, device=device_of(model))
    more = {"decoder_input_ids": tokens} if task_of(model.config).stacks == 2 else {}
    try:
        with evaluating(model), torch.no_grad():
            model(input_ids=tokens, **more)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found.get(id(parameter), top) for name, parameter in model.named_parameters()}


def decays(levels: Mapping[str, int], decay: float) -> dict[str, float]:
    """Parameter name -> factor on its rate.

    >>> decays({"embed": 0, "block": 1, "head": 2}, 0.5)
    {'embed': 0.25, 'block': 0.5, 'head': 1.0}
    """
    top = max(levels.values(), default=0)
    return {name: decay ** (top - level) for name, level in levels.items()}


def begins(level: int, top: int, unfreeze: float, steps: int) -> int:
    """The step, of 0 .. steps - 1, from which on a level learns, `top` being that of the heads.

    >>> [begins(level, 3, 0.6, 10) for level in range(4)]
    [6, 4, 2, 0]
    """
    last = min(round(unfreeze * steps), steps - 1)
    return -(-last * (top - level) // top)


def below(model: Any, last_blocks: int | None) -> set[str]:
    """Names of the parameters that lie below the last so many blocks; none where all blocks learn."""
    if last_blocks is None:
        return set()
    count = len(block_names(model))
    return {name for name, level in levels(model).items() if level <= count - last_blocks}


def require_blocks(model: nn.Module, last_blocks: int | None) -> None:
    """Refuse more blocks than there are.

    Raises:
        UserError: tells both numbers.
    """
    count = len(block_names(model)) if last_blocks is not None else 0
    if last_blocks is not None and last_blocks > count:
        raise UserError(f"last_blocks: {last_blocks}, but the model has {count} blocks; take at most {count}")


@contextmanager
def dropping(model: nn.Module, share: float | None) -> Iterator[None]:
    """Every `nn.Dropout` of a model drops this share while the block runs; None: what it drops by itself."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    own = [layer.p for layer in layers]
    if share is not None:
        for layer in layers:
            layer.p = share
    try:
        yield
    finally:
        for layer, p in zip(layers, own, strict=True):
            layer.p = p


def require_dropout(model: nn.Module, share: float | None) -> None:
    """Refuse to change what a model has not.

    Raises:
        UserError: it has no layer that drops anything.
    """
    if share is not None and not any(isinstance(module, nn.Dropout) for module in model.modules()):
        raise UserError(
            f"dropout: {type(model).__name__} has no dropout layer whose share could be {share:g}; "
            "leave it out"
        )
