"""How a block runs: which linear layers read the same tensor, and what can be left out once they are done.

Found by watching the block run once (`plan_of`), never by the names of an architecture.
"""

import itertools
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.blocks import call, replaced_forward

_ROUNDING = 1e-4  # of what a block adds: how exactly it must be the sum of what its layers add


@dataclass(frozen=True)
class Shortcut:
    """A submodule whose output is that of its last linear layer."""

    module: str
    layer: str
    tuple_length: int | None  # the output is a tuple of so many, all but the first None
    feeders: tuple[str, ...] = ()  # modules whose output is a stage's input, and nothing else needs it

    def output(self, y: Tensor) -> Any:
        """What the submodule returns when its last layer gives y."""
        return y if self.tuple_length is None else (y, *[None] * (self.tuple_length - 1))


@dataclass(frozen=True)
class BlockPlan:
    """How a block runs.

    Attributes:
        stages: the layers in the order in which they run, those that read the same tensor together.
        shortcuts: per last layer, the submodule that ends with it.
        sources: per first layer of a stage, the feeder that makes its input, if later stages need it again.
        added: layers whose outputs, in this order, are added to the block's input to make its output;
            empty where the block is not of that kind.
    """

    stages: tuple[tuple[str, ...], ...]
    shortcuts: dict[str, Shortcut]
    sources: dict[str, str]
    added: tuple[str, ...]


def plan_of(block: nn.Module, names: list[str], hidden: Tensor, arguments: tuple[Any, Any]) -> BlockPlan:
    """Watch a block run in float32 and note how it does.

    Args:
        block: a decoder or encoder block.
        names: its linear layers, as it names them.
        hidden: one batch of its inputs.
        arguments: what else it is called with.
    """
    seen: list[tuple[str, Tensor]] = []
    results: dict[str, Any] = {}

    with ExitStack() as stack:
        for name in names:

            def before(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                seen.append((name, args[0]))

            stack.callback(block.get_submodule(name).register_forward_pre_hook(before).remove)
        for name, module in block.named_modules():

            def after(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                results[name] = output

            stack.callback(module.register_forward_hook(after).remove)
        call(block, hidden, arguments, "float32")

    stages: list[list[str]] = []
    last: Tensor | None = None
    for name, x in seen:
        if last is not None and x is last:
            stages[-1].append(name)
        else:
            stages.append([name])
        last = x
    shortcuts = _shortcuts(stages, results)
    sources = _sources(block, stages, seen, results)
    for layer, shortcut in shortcuts.items():
        inside = [stage for stage in stages if stage[0].startswith(shortcut.module + ".")]
        made_by = [sources[stage[0]] for stage in inside if stage[0] in sources]
        alone = [m for m in made_by if _feeds_only(block, shortcut, m, results, hidden, arguments)]
        shortcuts[layer] = replace(shortcut, feeders=tuple(alone))
    feeders = {feeder for shortcut in shortcuts.values() for feeder in shortcut.feeders}
    sources = {
        layer: module for layer, module in sources.items() if module in feeders and layer not in shortcuts
    }
    total, output = hidden, results[""]
    ends = [name for stage in stages for name in stage if name in shortcuts]
    for name in ends:
        if results[name].shape == hidden.shape:
            total = total + results[name]
    whole = output[0] if isinstance(output, tuple) else output
    sums = total.shape == whole.shape and bool((whole - total).norm() <= _ROUNDING * (whole - hidden).norm())
    return BlockPlan(tuple(map(tuple, stages)), shortcuts, sources, tuple(ends) if sums else ())


def _sources(
    block: nn.Module, stages: list[list[str]], seen: list[tuple[str, Tensor]], results: dict[str, Any]
) -> dict[str, str]:
    """Per first layer of a stage, the module without parts (a norm, say) that made its input, if one did."""
    inputs = dict(seen)
    parts = {name for name, module in block.named_modules() if next(module.children(), None) is None}
    return {
        stage[0]: name
        for stage in stages
        for name, output in results.items()
        if name in parts and output is inputs[stage[0]]
    }


def _feeds_only(
    block: nn.Module,
    shortcut: Shortcut,
    feeder: str,
    results: dict[str, Any],
    hidden: Tensor,
    arguments: tuple[Any, Any],
) -> bool:
    """Whether the block gives the same, its submodule skipped, when the feeder gives something useless."""
    output = results[""]
    with ExitStack() as stack:
        for name, value in (
            (shortcut.module, shortcut.output(results[shortcut.layer])),
            (feeder, torch.full_like(results[feeder], torch.nan)),
        ):
            forward = partial(_constant, value)
            stack.enter_context(replaced_forward(block.get_submodule(name), forward))
        found = call(block, hidden, arguments, "float32")
    return torch.equal(found, output[0] if isinstance(output, tuple) else output)


def _constant(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _shortcuts(stages: list[list[str]], results: dict[str, Any]) -> dict[str, Shortcut]:
    """The largest submodule that ends with each layer, if it holds no layer that runs later."""
    order = {name: number for number, stage in enumerate(stages) for name in stage}
    found = {}
    for name in order:
        for module in itertools.accumulate(name.split(".")[:-1], lambda a, b: f"{a}.{b}"):
            output = results.get(module)
            inside = [other for other in order if other.startswith(module + ".")]
            if any(order[other] > order[name] for other in inside):
                continue
            if output is results[name]:
                found[name] = Shortcut(module, name, None)
                break
            if (
                isinstance(output, tuple)
                and output[0] is results[name]
                and all(x is None for x in output[1:])
            ):
                found[name] = Shortcut(module, name, len(output))
                break
    return found
