"""One block, run on stored inputs, stage by stage.

A stage is a set of linear layers that read the same tensor. A solver wants the inputs of a stage after the
layers before it were changed, so the block is run once per stage, up to where that stage begins. What has
been run before and cannot change any more is not run again: once every layer inside a submodule (the
attention, say) is done and the submodule's output is its last layer's output, that layer is applied to its
stored inputs and the submodule is skipped, and with it the norm that feeds nothing else. Attention and
norms then run once per block and stream.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.plan import BlockPlan, Shortcut
from compress.formats import QuantizedLinear
from compress.models.blocks import Arguments, call, replaced_forward
from compress.models.running import Precision, autocast


class _Stop(Exception):
    """Ends a forward pass as soon as the wanted input has been seen."""


@dataclass
class Stream:
    """A block and the activations that flow through it.

    Attributes:
        block: the module.
        hidden: its inputs, (batch, length, width) per batch, float32.
        arguments: what else it is called with, per batch.
        precision: what it computes in.
        plan: of this block.
        final: its layers will not change, so that none of their inputs need be kept.
    """

    block: nn.Module
    hidden: list[Tensor]
    arguments: Arguments
    precision: Precision
    plan: BlockPlan
    final: bool = False
    # of layers that end a submodule: their inputs, and in place of those, once asked for, their outputs
    _known: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    _applied: set[tuple[str, int]] = field(default_factory=set)
    _settled: set[int] = field(default_factory=set)
    _fed: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # outputs of feeders

    def inputs(self, stage: tuple[str, ...]) -> Generator[Tensor, None, None]:
        """Inputs of the layers of a stage, (rows, in), batch after batch; a run ends where they are seen."""
        seen: list[Tensor] = []
        kept = torch.bfloat16 if self.precision == "bfloat16" else torch.float32

        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0].to(kept))
            raise _Stop

        handle = self.block.get_submodule(stage[0]).register_forward_pre_hook(look)
        try:
            with self._skipping() as at:
                for index in range(len(self.hidden)):
                    at(index)
                    with suppress(_Stop):
                        call(self.block, self.hidden[index], self.arguments[index], self.precision)
                    x = seen.pop()
                    self._keep(stage, index, x)
                    yield x.flatten(0, -2)
        finally:
            handle.remove()

    def _keep(self, stage: tuple[str, ...], index: int, x: Tensor) -> None:
        """Of a batch's input, what later stages need."""
        if stage[0] in self.plan.sources:
            self._fed.setdefault(self.plan.sources[stage[0]], {})[index] = x
        for name in stage:
            if name in self.plan.shortcuts:
                for feeder in self.plan.shortcuts[name].feeders:
                    self._fed.get(feeder, {}).pop(index, None)
                self._known.setdefault(name, {})[index] = x
                if self.final:
                    self._apply(name, index)

    def knows_residual(self, layer: str) -> bool:
        """Whether `residual` can tell what this layer's output is added to."""
        added = self.plan.added
        return layer in added and all(name in self._known for name in added[: added.index(layer)])

    def residual(self, layer: str, index: int) -> Tensor:
        """The stream that this layer's output is added to, (rows, width), of one batch."""
        total = self.hidden[index]
        for before in self.plan.added[: self.plan.added.index(layer)]:
            total = total + self._apply(before, index)
        return total.flatten(0, -2)

    def narrows(self, layer: str) -> bool:
        """Whether this layer ends a submodule and has fewer outputs than inputs."""
        if layer not in self.plan.shortcuts:
            return False
        module: Any = self.block.get_submodule(layer)
        return int(module.out_features) < int(module.in_features)

    def output(self, layer: str, index: int) -> Tensor:
        """What a layer that will not change gives for one batch, (rows, out), float32."""
        return self._apply(layer, index).flatten(0, -2).float()

    def through(self, layer: str, x: Tensor) -> Tensor:
        """What a layer gives for other inputs (rows, in): (rows, out), float32."""
        with autocast(x.device, self.precision):
            return self.block.get_submodule(layer).forward(x).float()  # past any hook of ours

    def settle(self, index: int) -> None:
        """Put what the block gives for one batch in the memory of its input, if all it adds is known."""
        added = self.plan.added
        if index in self._settled or not added or any(index not in self._known.get(n, {}) for n in added):
            return
        for layer in added:
            self.hidden[index] += self._apply(layer, index)
        for kept in (*self._known.values(), *self._fed.values()):
            kept.pop(index, None)
        self._settled.add(index)

    def let_go(self) -> None:
        """Free the block's weights if every batch is settled."""
        if len(self._settled) == len(self.hidden):
            self.block = nn.Module()

    def outputs(self) -> list[Tensor]:
        """What the block gives, per batch: in the memory of its inputs, which are gone."""
        with _weights_rebuilt_once(self.block, self.precision):
            for index in range(len(self.hidden)):
                self.settle(index)
        if len(self._settled) < len(self.hidden):
            with self._skipping() as at:
                for index, hidden in enumerate(self.hidden):
                    if index not in self._settled:
                        at(index)
                        hidden.copy_(call(self.block, hidden, self.arguments[index], self.precision))
        for memory in (self._known, self._applied, self._fed, self._settled):
            memory.clear()
        return self.hidden

    def _apply(self, layer: str, index: int) -> Tensor:
        """The output of a layer that will not change any more."""
        kept = self._known[layer]
        if (layer, index) not in self._applied:
            with autocast(self.hidden[index].device, self.precision):
                kept[index] = self.block.get_submodule(layer).forward(kept[index])  # past any hook of ours
            self._applied.add((layer, index))
        return kept[index]

    @contextmanager
    def _skipping(self) -> Iterator[Callable[[int], None]]:
        """Replace what need not run again; the value takes the number of the batch that runs."""
        current = [0]

        def skipped(shortcut: Shortcut) -> Callable[..., Any]:
            return lambda *_, **__: shortcut.output(self._apply(shortcut.layer, current[0]))

        def fed(outputs: dict[int, Tensor]) -> Callable[..., Any]:
            return lambda *_, **__: outputs[current[0]]

        replaced: dict[str, Callable[..., Any]] = {name: fed(kept) for name, kept in self._fed.items()}
        for name in self._known:
            shortcut = self.plan.shortcuts[name]
            replaced[shortcut.module] = skipped(shortcut)
            replaced |= dict.fromkeys(shortcut.feeders, _unchanged)  # nobody looks at what they give
        with ExitStack() as stack:
            stack.enter_context(_weights_rebuilt_once(self.block, self.precision))
            for name, forward in replaced.items():
                stack.enter_context(replaced_forward(self.block.get_submodule(name), forward))
            yield lambda index: current.__setitem__(0, index)


def _unchanged(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


@contextmanager
def _weights_rebuilt_once(block: nn.Module, precision: Precision) -> Iterator[None]:
    """Layers that rebuild or convert their weight at every call do it once, at the first, for all batches."""
    with ExitStack() as stack:
        for module in block.modules():
            coded = isinstance(module, QuantizedLinear) and module.activations is None
            if coded or (type(module) is nn.Linear and precision == "bfloat16"):
                stack.enter_context(replaced_forward(module, _remembering(module, precision)))
        yield


def _remembering(module: nn.Module, precision: Precision) -> Callable[[Tensor], Tensor]:
    """The forward of a linear layer that looks at its weight once."""
    kept: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        if not kept:
            weight: Tensor = module.weight  # type: ignore[assignment]
            kept.append(weight.to(torch.bfloat16) if precision == "bfloat16" else weight)
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        return nn.functional.linear(x, kept[0], bias)

    return forward


def halved(block: nn.Module) -> nn.Module:
    """The block with the weights of its linear layers in bfloat16, which autocast makes them anyway."""
    for module in block.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(module.weight.detach().to(torch.bfloat16), requires_grad=False)
    return block
