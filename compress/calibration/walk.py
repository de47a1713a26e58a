"""The one layer-by-layer walk.

    for visit in walk(model, windows, names, both_streams=True):
        ...  # visit.covariance holds the statistics of the inputs of visit.names
        put_codes(model, name, ...)

Blocks are visited in order, and inside a block the linear layers in the order in which they run, those
that read the same input (q, k, v; gate, up) together. What the caller changes during a visit takes part in
all later visits: activations always come through the layers already compressed. With `both_streams` the
original activations run beside them, so that a solver can aim at what the original model computed.

Memory stays near one block and one block's activations on the calibration text, whatever the depth: only
the input of the current block is held (twice with both streams), and the inputs of its layers. With a
`store`, the blocks themselves are only in memory while they are visited. Hooks are removed in every case,
also when the caller breaks out of the loop.
"""

import copy
import itertools
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.calibration.moments import Covariance, Rows, covariance
from compress.calibration.plan import BlockPlan, plan_of
from compress.calibration.replay import Stream, halved
from compress.errors import UserError
from compress.host.float32 import fast_float32
from compress.host.memory import returned_at_once, trim
from compress.host.progress import track
from compress.models.attention import panel_attention
from compress.models.blocks import Arguments
from compress.models.running import Precision, evaluating
from compress.models.stacks import Stack, stacks

_LARGE = 1 << 22  # elements
_TOKENS = 2048  # per forward pass


@dataclass
class Visit:
    """Linear layers that read the same input, and what is known of it.

    Attributes:
        block: its number.
        names: full module names.
        covariance: of the inputs on all windows but the held-out ones.
        heldout: of those on the held-out windows; None if there are none.
    """

    block: int
    names: list[str]
    covariance: Covariance
    heldout: Covariance | None = None


class BlockStore(Protocol):
    """Where blocks are while they are not visited."""

    def load(self, name: str) -> None:
        """Put the weights of the module `name` into memory."""
        ...

    def release(self, name: str) -> None:
        """The module `name` is done: keep what it has become, and free its memory."""
        ...

    def loaded(self, modules: Iterable[str]) -> AbstractContextManager[None]:
        """Some modules in memory for a while, to be read only."""
        ...


@torch.no_grad()
def walk(
    model: Any,
    windows: Tensor,
    names: list[str],
    *,
    both_streams: bool = False,
    residual: bool = True,
    heldout: int = 0,
    batch: int | None = None,
    precision: Precision = "float32",
    store: BlockStore | None = None,
    what: str = "calibrating",
) -> Iterator[Visit]:
    """Visit the linear layers `names` of `model` with the statistics of their inputs on `windows`.

    Args:
        model: changed by the caller between visits; in eval mode.
        windows: token ids (n, length).
        names: full module names; those outside the blocks are an error.
        both_streams: also run the original activations.
        residual: and by how much the stream that a layer's output is added to differs in the two.
        heldout: so many of the last windows are held out, for choices that must not see the others.
        batch: windows per forward pass; None: about 2048 tokens, whose activations fit in caches.
        precision: `bfloat16` runs the blocks under autocast; statistics are float32 either way.
        store: loads each block before its visit and takes it back after; None: all are in memory.
        what: for the progress bar.
    """
    parts = stacks(model)
    prefixes = tuple(f"{part.prefix}." for part in parts)
    outside = [name for name in names if not name.startswith(prefixes)]
    if outside:
        lists = " or ".join(f"'{prefix}*'" for prefix in prefixes)
        raise UserError(f"'{outside[0]}' is not inside the blocks {lists}, so it cannot be calibrated")
    batch = batch or max(1, _TOKENS // windows.shape[1])
    fitting = len(windows) - heldout
    batches = [*windows[:fitting].split(batch), *(windows[fitting:].split(batch) if heldout else ())]
    fitted = -(-fitting // batch)  # batches; those after them are held out
    # giving every array back takes time, and is worth it where they are large
    largest = max(p.numel() for part in parts for p in part.blocks.parameters())
    frugal = store is not None and largest >= _LARGE
    with ExitStack() as stack:
        progress = stack.enter_context(track(sum(len(part.blocks) for part in parts), what, "blocks"))
        stack.enter_context(evaluating(model))
        stack.enter_context(panel_attention(model))
        # the faster library packs a copy of a factor, which a wide layer's statistics have no room for
        stack.enter_context(returned_at_once() if frugal else fast_float32())  # the caller's solvers too
        encoded: list[list[Tensor]] = []  # what an encoder made of the windows, in each flow
        for part in parts:
            with nullcontext() if store is None else store.loaded(_before_the_blocks(model, part.prefix)):
                flows = _flows(part, batches, both_streams, encoded)
            plans: dict[Any, BlockPlan] = {}
            for index, block in enumerate(part.blocks):
                name = f"{part.prefix}.{index}"
                if store is not None:
                    store.load(name)
                inner = [n.removeprefix(f"{name}.") for n in names if n.startswith(f"{name}.")]
                key = (type(block), *inner)  # blocks of one kind run in one order
                if key not in plans:
                    plans[key] = plan_of(block, inner, flows[0].hidden[0], flows[0].arguments[index][0])
                streams = [flow.stream(block, index, precision, plans[key]) for flow in flows]
                for stage in plans[key].stages:
                    visit = Visit(
                        index, [f"{name}.{n}" for n in stage], *_statistics(streams, stage, residual, fitted)
                    )
                    if both_streams:
                        streams[1].let_go()  # once all is settled; the last layers are solved without it
                    if store is not None:
                        trim()  # the forward passes leave holes
                    yield visit
                    del visit
                    if frugal:
                        trim()
                for flow, stream in zip(flows, streams, strict=True):
                    flow.hidden = stream.outputs()
                if store is not None:
                    store.release(name)
                trim()
                progress.advance()
            if part is not parts[-1]:
                encoded = [part.after(batches, flow.hidden) for flow in flows]


@dataclass
class _Flow:
    """Activations that run through the blocks of a part of the model.

    Attributes:
        hidden: inputs of the block that is visited, per batch.
        arguments: what else each block is called with, per batch.
        original: through the blocks as they were; each is copied for as long as it is visited.
    """

    hidden: list[Tensor]
    arguments: list[Arguments]
    original: bool = False

    def stream(self, block: nn.Module, index: int, precision: Precision, plan: BlockPlan) -> Stream:
        if self.original:
            block = copy.deepcopy(block)
            if precision == "bfloat16":
                block = halved(block)
        return Stream(block, self.hidden, self.arguments[index], precision, plan, final=self.original)


def _flows(part: Stack, batches: list[Tensor], both: bool, encoded: list[list[Tensor]]) -> list[_Flow]:
    """What reaches a part of the model; behind an encoder, with what each flow has made of it."""
    flows = [_Flow(*part.inputs(batches, encoded[0] if encoded else None))]
    if both and encoded:
        flows.append(_Flow(*part.inputs(batches, encoded[1]), original=True))
    elif both:
        flows.append(_Flow([x.clone() for x in flows[0].hidden], flows[0].arguments, original=True))
    return flows


def _statistics(
    streams: list[Stream], stage: tuple[str, ...], residual: bool, fitted: int
) -> tuple[Covariance, Covariance | None]:
    """Moments of a stage's inputs, of the first `fitted` batches and of those held out, if any."""
    batches = len(streams[0].hidden)
    with closing(_rows(streams, stage, residual)) as rows:
        seen = covariance(itertools.islice(rows, fitted))
        return seen, covariance(rows) if fitted < batches else None


def _rows(streams: list[Stream], stage: tuple[str, ...], residual: bool) -> Generator[Rows, None, None]:
    """A stage's inputs in every stream, and the residual of what a single layer is added to."""
    with ExitStack() as stack:
        running = [stack.enter_context(closing(stream.inputs(stage))) for stream in streams]
        inputs = zip(*running, strict=True)
        if len(streams) == 1:
            yield from (Rows(x) for (x,) in inputs)
            return
        compressed, original = streams
        alone = stage[0] if len(stage) == 1 else ""
        known = residual and all(stream.knows_residual(alone) for stream in streams)
        narrows = original.narrows(alone)
        for index, (changed, x) in enumerate(inputs):
            change = None
            if known:
                change = original.residual(alone, index) - compressed.residual(alone, index)
            if narrows:
                lost = original.output(alone, index) - original.through(alone, changed)
                rows = Rows(changed, wanted=lost if change is None else change.add_(lost))
            else:
                rows = Rows(changed, x, change)
            if stage == original.plan.stages[-1]:
                original.settle(index)
            yield rows


def _before_the_blocks(model: Any, prefix: str) -> list[str]:
    """Modules outside the blocks and the head that hold parameters of their own."""
    return [
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and not name.startswith(prefix + ".")
        and module is not model.get_output_embeddings()
    ]
