"""What can be taken out of a model, and what must go with it.

A *unit* is the smallest thing that goes as a whole: a key-value head with the query heads that read it, or a
neuron of an MLP. It ends in columns of one linear layer, its *reader* (o_proj, down_proj): without the unit
the reader has fewer inputs, and the block's output keeps its width. The channels of the residual stream are
units of their own kind, since every block reads and writes them.

Which entries of which parameters belong to a unit is the answer of torch-pruning's dependency graph (Fang et
al. 2023, DepGraph, arXiv 2301.12900), built from one traced forward pass, with no table of architectures.
What the graph says is checked: the units of a reader must share nothing, and must together be every tensor
they touch. A layer of k stacked parts (GPT-2's query, key and value in one) appears in the graph as its
first part; the others follow it. The cost is one forward pass of a few tokens and lists of indices.

An encoder-decoder has two lists of blocks and one table of tokens, so that both streams keep the same
channels. T5's relative positions have a column per head, in the first block of each list, for all of its
blocks: the graph is made without them, and the heads that share a table are chosen together.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import MissingExtra, UserError
from compress.models.attention_layers import HEAD_WIDTHS
from compress.models.layers import is_linear
from compress.models.running import gradients
from compress.structured.blocks import lists_of_blocks
from compress.tasks.registry import task_of

UnitKind = Literal["heads", "neurons"]
_TOKENS = 5
_PLACES, _TABLE = "has_relative_attention_bias", "relative_attention_bias"  # T5's relative positions


@dataclass(frozen=True)
class Part:
    """The entries of one axis of a parameter that belong to each unit.

    Attributes:
        parameter: full name; a tied one under the name that `named_parameters` gives it.
        axis: of the tensor as the model holds it.
        entries: int64 (units, entries per unit); no entry twice, and all of the axis together.
    """

    parameter: str
    axis: int
    entries: Tensor


@dataclass(frozen=True)
class Sublayer:
    """The units of one sublayer.

    Attributes:
        block: its number.
        kind: what the units are.
        reader: full name of the linear layer that reads them.
        columns: of the reader's inputs, int64 (units, columns per unit).
        parts: every parameter that holds something of them, the reader's weight among them.
        stack: the name of its list of blocks.
        table: the parameter with a column for each of its units, where several blocks use one (T5's relative
            positions): they keep the same units.
    """

    block: int
    kind: UnitKind
    reader: str
    columns: Tensor
    parts: tuple[Part, ...]
    stack: str = ""
    table: str | None = None

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.columns)


@dataclass(frozen=True)
class Structure:
    """All units: those of the sublayers, block by block, and the channels of the residual stream.

    Attributes:
        sublayers: of the blocks.
        stream: all that reads or writes the residual stream, a unit per channel.
        width: of the stream.
        inside_heads: of each layer outside the blocks that configurations make as wide as the stream (a
            pooler, the dense layer before a classifier), all that holds its channels, a unit per channel.
    """

    sublayers: tuple[Sublayer, ...]
    stream: tuple[Part, ...]
    width: int
    inside_heads: tuple[tuple[Part, ...], ...] = ()

    def of(self, kind: UnitKind) -> tuple[Sublayer, ...]:
        """The sublayers of one kind."""
        return tuple(s for s in self.sublayers if s.kind == kind)

    def units(self, kind: UnitKind) -> int:
        """Units per block; 0 where blocks differ, which are given one number together or none."""
        counts = {s.units for s in self.of(kind)}
        return counts.pop() if len(counts) == 1 else 0

    def of_blocks(self, prefix: str, kept: list[int]) -> "Structure":
        """That of the model with only the blocks `kept` of its list `prefix`, under their new numbers."""
        new = {f"{prefix}.{old}.": f"{prefix}.{number}." for number, old in enumerate(kept)}

        def rename(name: str) -> str | None:
            if not name.startswith(f"{prefix}."):
                return name
            own = ".".join(name.split(".")[: prefix.count(".") + 2]) + "."
            return name.replace(own, new[own], 1) if own in new else None

        def parts(old: tuple[Part, ...]) -> tuple[Part, ...]:
            named = ((rename(part.parameter), part) for part in old)
            return tuple(replace(part, parameter=name) for name, part in named if name is not None)

        sublayers = tuple(
            replace(s, block=kept.index(s.block), reader=str(rename(s.reader)), parts=parts(s.parts))
            if s.stack == prefix
            else s
            for s in self.sublayers
            if s.stack != prefix or s.block in kept
        )
        return Structure(sublayers, parts(self.stream), self.width, self.inside_heads)


def require_torch_pruning() -> None:
    """Raise MissingExtra where the package is absent."""
    if find_spec("torch_pruning") is None:
        raise MissingExtra("torch-pruning", "pruning", "prune_structured")


def find_structure(model: Any) -> Structure:
    """Trace the model on a few tokens and read its units off the graph.

    Raises:
        UserError: torch-pruning is absent, or its graph does not describe this architecture.
    """
    require_torch_pruning()
    kind = model.config.model_type
    try:
        with _traceable(model), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # the graph warns of every norm that it has no class for
            return _Reader(model).structure()
    except (
        _Unclear,
        AssertionError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise UserError(
            f"prune_structured: the dependency graph of model_type '{kind}' is not clear "
            f"({str(error).strip() or type(error).__name__}); take student or prune_magnitude instead"
        ) from None


class _Unclear(Exception):
    """What the graph says cannot be."""


@contextmanager
def _traceable(model: Any) -> Iterator[None]:
    """Attention in plain operations, which the graph can follow, and gradients, which it is made of."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    placed = [m for m in model.modules() if getattr(m, _PLACES, False)]
    for module in placed:
        setattr(module, _PLACES, False)
    try:
        with gradients(model, True):
            yield
    finally:
        for module in placed:
            setattr(module, _PLACES, True)
        model.set_attn_implementation(before)


class _Reader:
    """One graph, and what is read off it."""

    def __init__(self, model: Any) -> None:
        from torch_pruning import DependencyGraph

        self.model = model
        self.modules = {module: name for name, module in model.named_modules()}
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.sizes = {name: p.shape for name, p in model.named_parameters()}
        ids = torch.arange(_TOKENS, device=model.get_input_embeddings().weight.device)[None]
        self.graph = DependencyGraph()
        self.graph.build_dependency(model, ids, forward_fn=_forward, verbose=False)
        _join_plainly(self.graph)

    def structure(self) -> Structure:
        width = int(self.model.get_input_embeddings().embedding_dim)
        stream = self._stream(width)
        sublayers = []
        lists = lists_of_blocks(self.model)
        for prefix, blocks in lists:
            for index, block in enumerate(blocks):
                for name, module in block.named_modules():
                    if is_linear(module) and self._writes(module, stream):
                        sublayers.append(self._sublayer(prefix, index, name, module))
        if not sublayers:
            raise _Unclear("no layer writes to the residual stream")
        inside = tuple(self._inside_heads(tuple(f"{prefix}." for prefix, _ in lists), stream, width))
        return Structure(tuple(sublayers), _one_channel_each(stream), width, inside)

    def _stream(self, width: int) -> tuple[Part, ...]:
        """All that reads or writes what begins with a row of the token table."""
        table = self.model.get_input_embeddings().weight
        looked_up = [
            module
            for module in self.modules
            if isinstance(module, nn.Embedding)
            and module.weight is table
            and module in self.graph.module2node
        ]
        found: dict[tuple[str, int], Part] = {}
        for module in looked_up:  # an encoder's and its decoder's, each with a stream of its own
            for part in self._parts(module, "out", torch.arange(width)[None]):
                known = found.setdefault((part.parameter, part.axis), part)
                if not torch.equal(known.entries, part.entries):
                    raise _Unclear(f"'{part.parameter}' has other channels in one stream than in the other")
        return tuple(found.values())

    def _inside_heads(
        self, blocks: tuple[str, ...], stream: tuple[Part, ...], width: int
    ) -> Iterator[tuple[Part, ...]]:
        """The channels of layers outside the blocks that are as wide as the stream, and no part of it."""
        reading = {part.parameter for part in stream if part.axis == 1}
        for module, name in self.modules.items():
            if name.startswith(blocks) or not is_linear(module) or self._writes(module, stream):
                continue
            if module.weight.shape[0] == width and self._named(module.weight) in reading:
                yield _one_channel_each(self._parts(module, "out", torch.arange(width)[None]))

    def _sublayer(self, stack: str, block: int, inner: str, module: Any) -> Sublayer:
        name, columns = f"{stack}.{block}.{inner}", int(module.in_features)
        everything = torch.arange(columns)
        feeding = self._group(module, "in", everything[:1])
        widths = {w for name, _ in feeding if (w := self._head_width(name)) is not None}
        if not widths:
            parts = self._parts(module, "in", everything[None])
            return Sublayer(block, "neurons", name, everything[:, None], _one_channel_each(parts), stack)
        head = widths.pop()
        # of key-value heads there are as many as the narrowest layer that makes them has room for
        units = (
            min(columns, *(self.sizes[n][axis] for n, axis in feeding if not self._is_head_norm(n, head)))
            // head
        )
        if widths or not units or columns % (units * head):
            raise _Unclear(f"'{name}' reads {columns} columns, not {units} groups of whole heads")
        own = everything.view(units, -1)
        table, more = self._table(stack, block, inner.rpartition(".")[0], units)
        parts = (*self._parts(module, "in", own, head), *more)
        return Sublayer(block, "heads", name, own, parts, stack, table)

    def _table(
        self, stack: str, block: int, attention: str, heads: int
    ) -> tuple[str | None, tuple[Part, ...]]:
        """The table of relative positions that an attention uses, and the part of it, where it is its own."""
        owners = (f"{stack}.{number}.{attention}.{_TABLE}" for number in range(block, -1, -1))
        name = next((f"{owner}.weight" for owner in owners if f"{owner}.weight" in self.sizes), None)
        if name is None or not name.startswith(f"{stack}.{block}."):
            return name, ()
        if self.sizes[name][1] != heads:
            raise _Unclear(f"'{name}' has {self.sizes[name][1]} columns, not one for each of {heads} heads")
        return name, (Part(name, 1, torch.arange(heads)[:, None]),)

    def _parts(self, module: Any, side: str, units: Tensor, head: int | None = None) -> tuple[Part, ...]:
        """Of every parameter that goes with the units (units, channels) of a module's inputs or outputs.

        `head`: of so many channels at a time; the graph does not end where several query heads of one
        key-value head are asked for together.
        """
        found: dict[tuple[str, int], list[list[int]]] = {}
        for number, unit in enumerate(units):
            for channels in unit.split(head or len(unit)):
                for key, entries in self._group(module, side, channels).items():
                    found.setdefault(key, [[] for _ in units])[number] += entries
        return tuple(
            self._part(key, lists) for key, lists in found.items() if not self._is_head_norm(key[0], head)
        )

    def _group(self, module: Any, side: str, channels: Tensor) -> dict[tuple[str, int], list[int]]:
        """(parameter, axis) -> its entries that go with some channels of a module."""
        pruner = self.graph.get_pruner_of_module(module)
        prune = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
        found: dict[tuple[str, int], list[int]] = {}
        for item in self.graph.get_pruning_group(module, prune, channels.tolist()):
            for key in self._tensors(item.dep.target.module, item.dep.handler.__name__):
                found.setdefault(key, []).extend(item.idxs)
        return found

    def _part(self, key: tuple[str, int], lists: list[list[int]]) -> Part:
        """The entries, those of stacked parts included, checked to be each entry once."""
        (name, axis), size = key, self.sizes[key[0]][key[1]]
        rows = [list(dict.fromkeys(entries)) for entries in lists]  # in the order of the root's channels
        covered = sum(map(len, rows))
        if len({len(row) for row in rows}) != 1 or not covered or size % covered:
            raise _Unclear(f"'{name}' has {size} entries, of which {covered} belong to units")
        entries = torch.tensor(rows)
        stacked = [entries + covered * number for number in range(size // covered)]
        entries = torch.cat(stacked, dim=1)
        if not torch.equal(entries.flatten().sort().values, torch.arange(size)):
            raise _Unclear(f"'{name}' belongs to units that share entries")
        return Part(name, axis, entries)

    def _tensors(self, target: Any, handler: str) -> Iterator[tuple[str, int]]:
        """(parameter, axis) of what an entry of the graph's group stands for; none for an operation."""
        if isinstance(target, nn.Parameter):
            yield self.parameters[id(target)], target.dim() - 1
        elif type(target).__module__.startswith("torch_pruning"):
            return
        elif is_linear(target):
            written = handler == "prune_out_channels"
            yield self._named(target.weight), 0 if written else 1
            if written and target.bias is not None:
                yield self._named(target.bias), 0
        elif isinstance(target, nn.Embedding | nn.LayerNorm):
            for parameter in target.parameters(recurse=False):
                yield self._named(parameter), parameter.dim() - 1
        else:
            raise _Unclear(f"'{self.modules.get(target, target)}' is a {type(target).__name__}")

    def _writes(self, module: Any, stream: tuple[Part, ...]) -> bool:
        """Whether a linear layer's outputs are the stream's channels."""
        own = self._named(module.weight)
        return any((part.parameter, part.axis) == (own, 0) for part in stream)

    def _head_width(self, parameter: str) -> int | None:
        """The width of a head, where the parameter's layer belongs to an attention module."""
        module = self.model.get_submodule(parameter.rpartition(".")[0].rpartition(".")[0])
        return next((int(w) for w in (getattr(module, n, None) for n in HEAD_WIDTHS) if w), None)

    def _is_head_norm(self, name: str, head: int | None) -> bool:
        """Whether a parameter is a gain that all heads share (Qwen3's query and key norms)."""
        return head is not None and self.sizes[name] == (head,) and name.rpartition(".")[2] == "weight"

    def _named(self, parameter: Tensor) -> str:
        return self.parameters[id(parameter)]


def _one_channel_each(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Parts of one query over all channels, taken apart: (1, stacked * channels) -> (channels, stacked)."""
    channels = min(part.entries.numel() for part in parts)
    return tuple(Part(p.parameter, int(p.axis), p.entries.view(-1, channels).T.contiguous()) for p in parts)


def _forward(model: Any, ids: Tensor) -> Any:
    """All that the graph should know: what the task asks, and a pooler's output that is saved beside it."""
    task = task_of(model.config)
    if task.output == "logits":
        return task.answers(model, ids)
    output = model(input_ids=ids)
    pooled = getattr(output, "pooler_output", None)
    return output[0] if pooled is None else (output[0], pooled)


def _join_plainly(graph: Any) -> None:
    """Let concatenations keep the channels' numbers.

    The ones of a transformer join halves of a head (rotary positions), inside of what goes as a whole. The
    graph takes them for joined features and shifts the numbers, in a circle without an end.
    """
    for node in graph.module2node.values():
        if type(node.module).__name__ == "_ConcatOp":
            node.enable_index_mapping = False
            around = [*node.dependencies, *(d for n in (*node.inputs, *node.outputs) for d in n.dependencies)]
            for dependency in around:
                if node in (dependency.source, dependency.target):
                    dependency.index_mapping = [None, None]
