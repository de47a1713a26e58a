"""The one layer-by-layer walk.

    for visit in walk(model, windows, names, both_streams=True):
        ...  # visit.covariance holds the statistics of the inputs of visit.names
        put_codes(model, name, ...)

Blocks are visited in order, and inside a block the linear layers in the order in which they run, those
that read the same input (q, k, v; gate, up) together. What the caller changes during a visit takes part in
all later visits: activations always come through the layers already compressed. With `both_streams` the
original activations run beside them, so that a solver can aim at what the original model computed.

Memory stays near one block's activations on the calibration text, whatever the depth: only the input of
the current block is held (twice with both streams), and with both streams the original inputs of its
linear layers. Hooks are removed in every case, also when the caller breaks out of the loop.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.progress import track
from compress.training.forward import Precision, autocast


@dataclass
class Covariance:
    """Second moments of a layer's inputs, accumulated in float32.

    Attributes:
        hessian: sum of x~ x~^T, (in, in), x~ through the layers already compressed.
        cross: sum of x x~^T, (in, in), x in the original model; None with one stream.
        count: rows seen.
    """

    hessian: Tensor
    cross: Tensor | None
    count: int = 0

    def add(self, inputs: Tensor, originals: Tensor | None) -> None:
        """Take rows (n, in) into account."""
        x = inputs.float()
        self.hessian.addmm_(x.T, x)
        if self.cross is not None and originals is not None:
            self.cross.addmm_(originals.float().T, x)
        self.count += len(x)

    def means(self) -> tuple[Tensor, Tensor | None]:
        """(E[x~ x~^T], E[x x~^T] or None)."""
        return self.hessian / self.count, None if self.cross is None else self.cross / self.count


@dataclass
class Visit:
    """Linear layers that read the same input, and what is known of it."""

    block: int
    names: list[str]
    covariance: Covariance


class _Stop(Exception):
    """Ends a forward pass as soon as the wanted input has been seen."""


def decoder_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's blocks: the first ModuleList as long as `num_hidden_layers`.

    Raises:
        UserError: the model has none.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UserError(
        f"{type(model).__name__}: has no list of {count} blocks; this architecture is not supported"
    )


@torch.no_grad()
def walk(
    model: Any,
    windows: Tensor,
    names: list[str],
    *,
    both_streams: bool = False,
    batch: int = 4,
    precision: Precision = "float32",
    what: str = "calibrating",
) -> Iterator[Visit]:
    """Visit the linear layers `names` of `model` with the statistics of their inputs on `windows`.

    Args:
        model: changed by the caller between visits; in eval mode.
        windows: token ids (n, length).
        names: full module names; those outside the blocks are an error.
        both_streams: also run the original activations.
        batch: windows per forward pass.
        precision: `bfloat16` runs the blocks under autocast; statistics are float32 either way.
        what: for the progress bar.
    """
    prefix, blocks = decoder_blocks(model)
    outside = [name for name in names if not name.startswith(prefix + ".")]
    if outside:
        raise UserError(f"'{outside[0]}' is not inside the blocks '{prefix}.*', so it cannot be calibrated")
    device = next(model.parameters()).device
    with track(len(blocks), what, "blocks") as progress, _evaluating(model):
        recorder = _BlockInputs(model, blocks, windows.to(device).split(batch))
        compressed = recorder.first_inputs()
        original = [x.clone() for x in compressed] if both_streams else None
        for index, block in enumerate(blocks):
            inner = {
                n.removeprefix(f"{prefix}.{index}."): n for n in names if n.startswith(f"{prefix}.{index}.")
            }
            runner = _Runner(block, recorder.arguments(index), precision)
            groups = runner.groups(list(inner), compressed[0])
            stored: dict[str, list[Tensor]] = {}
            if original is not None:
                original, stored = runner.forward_storing(original, [g[0] for g in groups])
            for group in groups:
                covariance = runner.statistics(group[0], compressed, stored.pop(group[0], None))
                yield Visit(index, [inner[n] for n in group], covariance)
            compressed = runner.forward(compressed)
            progress.advance()


class _BlockInputs:
    """What every block is called with: runs the model once with blocks that pass their input through."""

    def __init__(self, model: Any, blocks: nn.ModuleList, batches: tuple[Tensor, ...]) -> None:
        self.inputs: list[Tensor] = []
        self.calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in blocks]
        backbone = getattr(model, "model", None) or getattr(model, model.base_model_prefix, model)
        own = [vars(block).get("forward") for block in blocks]  # a wrapper on the instance, if it has one
        try:
            for index, block in enumerate(blocks):
                vars(block)["forward"] = self._passing(index)
            for tokens in batches:
                backbone(input_ids=tokens, use_cache=False)
        finally:
            for block, forward in zip(blocks, own, strict=True):
                del vars(block)["forward"]
                if forward is not None:
                    vars(block)["forward"] = forward

    def _passing(self, index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                self.inputs.append(hidden_states.detach())
            self.calls[index].append((args, kwargs))
            return hidden_states

        return forward

    def first_inputs(self) -> list[Tensor]:
        """Inputs of the first block, one (batch, length, hidden) per batch."""
        return self.inputs

    def arguments(self, index: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Positions, masks and whatever else this block gets, per batch."""
        return self.calls[index]


class _Runner:
    """Runs one block on stored inputs, looking at the inputs of its linear layers."""

    def __init__(
        self, block: nn.Module, arguments: list[tuple[tuple[Any, ...], dict[str, Any]]], precision: Precision
    ) -> None:
        self.block, self.arguments, self.precision = block, arguments, precision

    def groups(self, names: list[str], inputs: Tensor) -> list[list[str]]:
        """Names in the order in which they run; those that read the very same tensor together."""
        seen: list[tuple[str, Tensor]] = []
        with self._watching(names, lambda name, x: seen.append((name, x))):
            self._call(inputs, 0)
        groups: list[list[str]] = []
        last: Tensor | None = None
        for name, x in seen:
            if last is not None and x is last:
                groups[-1].append(name)
            else:
                groups.append([name])
            last = x
        return groups

    def statistics(self, name: str, inputs: list[Tensor], originals: list[Tensor] | None) -> Covariance:
        """Covariance of the inputs of the layer `name`; each forward pass ends there."""
        covariance: Covariance | None = None

        def look(_: str, x: Tensor) -> None:
            nonlocal covariance
            if covariance is None:
                zeros = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
                covariance = Covariance(zeros, None if originals is None else zeros.clone())
            covariance.add(x.flatten(0, -2), None if originals is None else originals[index])
            raise _Stop

        with self._watching([name], look):
            for index, hidden in enumerate(inputs):
                try:
                    self._call(hidden, index)
                except _Stop:
                    continue
        assert covariance is not None
        return covariance

    def forward_storing(
        self, inputs: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Outputs of the block, and the inputs of the layers `names`, (rows, in) per batch."""
        stored: dict[str, list[Tensor]] = {name: [] for name in names}
        kept = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        with self._watching(names, lambda name, x: stored[name].append(x.flatten(0, -2).to(kept))):
            outputs = self.forward(inputs)
        return outputs, stored

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Outputs of the block."""
        return [self._call(hidden, index) for index, hidden in enumerate(inputs)]

    def _call(self, hidden: Tensor, index: int) -> Tensor:
        args, kwargs = self.arguments[index]
        with autocast(hidden.device, self.precision):
            output = self.block(hidden, *args, **kwargs)
        return (output[0] if isinstance(output, tuple) else output).float()

    @contextmanager
    def _watching(self, names: list[str], look: Callable[[str, Tensor], Any]) -> Iterator[None]:
        handles = []
        try:
            for name in names:
                module = self.block.get_submodule(name)

                def hook(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                    look(name, args[0])

                handles.append(module.register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
