"""A decoder as one ONNX graph, with a key-value cache and its logits where they are wanted.

Inputs   input_ids int64 (batch, sequence);
         attention_mask int64 (batch, past + sequence): 1 for a token, 0 for padding;
         past_key_values.<i>.key and .value float32 or int8 (batch, heads, past, width);
         logits_to_keep int64 (1,): how many positions, counted from the last, get logits; 0 means all;
         1 unless given.
Outputs  logits float32 (batch, kept, vocabulary); present.<i>.key and .value;
         last_logits (batch, 1, vocabulary): those of the last position, for callers that read its shape.

The names are those of `optimum` and `onnxruntime-genai`. The cache may be one buffer given as past and
present, which is then appended to in place. Rows that are not asked for leave after the last attention, so
a prompt pays neither the last MLP nor the head for them. Where matrices are float, tokens of a batch lie
flat, (batch * sequence, width), except inside attention, since `Gemm` wants them so; other products take
them as they are, (batch, sequence, width), which saves two nodes a block.

Prompts of different lengths in one batch are padded on the left, on the right, or on both sides, as the mask
says. A call begins by putting its ids in another order, those of tokens before those of padding: behind that
every text begins at position 0 of its row, and only the number of ones in its mask counts. With n ones a row
stands at position n - 1 after the call, so a decoded token overwrites the first padding in the cache and
gets that position. It costs seven nodes on whole numbers, whatever the model's size.
"The last" logits of a row are those of its own last token. Of more than one, each stands in its token's
column, but that columns of padding on the right leave first: a row that is shorter than logits_to_keep then
gets its first positions, with padding behind them.
Limits: in a later call than the first, several tokens may come for one row only; ONNX Runtime refuses more.
Zeros between ones of the ids of one call close up, and so do the columns of their logits.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from compress.export.onnx.architecture import Block, Decoder, Norm
from compress.export.onnx.attention import CacheScales, Positions, attention
from compress.export.onnx.embedding import embedding
from compress.export.onnx.forms import Forms, form_of
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.layers import add_norm, counting, flatten, mlp, norm, softcapped, unflatten
from compress.export.onnx.linear import linear
from compress.host.progress import track

_FLOAT, _INT32, _INT64 = 1, 6, 7
_END = 2**63 - 1


def write_decoder(
    graph: GraphBuilder, decoder: Decoder, forms: Forms, cache: Sequence[CacheScales] | None = None
) -> None:
    """Describe the whole decoder to `graph`; with `cache`, scales per block, the cache holds 8-bit codes."""
    _Writer(graph, decoder, forms, cache).write()


def forms_of_ends(forms: Forms) -> Forms:
    """Of the embedding and the head: of a prompt the head reads one row, for which blocks are closer and no
    slower (SmolLM2-135M, int8 per token, KL to torch 0.030 and 0.027)."""
    return replace(forms, int8="blocks")


class _Writer:
    """Holds the values that every block reads."""

    def __init__(
        self, graph: GraphBuilder, decoder: Decoder, forms: Forms, cache: Sequence[CacheScales] | None
    ) -> None:
        self.graph, self.decoder, self.forms = graph, decoder, forms
        self.ends = forms_of_ends(forms)
        self.cache: Sequence[CacheScales | None] = cache or [None] * len(decoder.blocks)
        self.width = int(decoder.embedding.shape[1])
        self.flat = any(form_of(layer, forms) == "float" for layer in decoder.matrices())
        self.ids = graph.input("input_ids", _INT64, ["batch", "sequence"])
        self.mask = graph.input("attention_mask", _INT64, ["batch", "total"])
        self.keep = graph.input("logits_to_keep", _INT64, [1], default=np.asarray([1]))
        self.logits = graph.output("logits", _FLOAT, ["batch", "kept", decoder.vocabulary])
        self.last_logits = graph.output("last_logits", _FLOAT, ["batch", 1, decoder.vocabulary])
        self.lengths = graph.op("ReduceSum", self.mask, graph.constant([1]), keepdims=1)  # (batch, 1)
        self.sequence = graph.op("Shape", self.ids, start=1)  # (1,)
        newest = graph.op("Neg", self.sequence), graph.constant([_END]), graph.constant([1])
        self.real = graph.op("Slice", self.mask, *newest)  # (batch, sequence): of this call's ids
        # of equal numbers the first comes first: columns of tokens in order, then those of padding
        self.order = graph.node("TopK", [self.real, self.sequence], 2)[1]  # (batch, sequence)
        last = graph.op("Sub", self.lengths, graph.constant([1]))
        self.text = Positions(
            shape=graph.op("Shape", self.ids) if self.flat else "",
            last=graph.op("Cast", last, to=_INT32),
            total=graph.op("Cast", graph.op("Shape", self.mask, start=1), to=_INT32),
            context=decoder.context,
        )

    def write(self) -> None:
        """The graph from ids to logits."""
        graph, decoder = self.graph, self.decoder
        ids = graph.op("GatherElements", self.ids, self.order, axis=1)
        ids = graph.sized(ids, _INT64, ["batch", "sequence"])
        if self.flat:
            ids = graph.sized(graph.op("Reshape", ids, graph.constant([-1])), _INT64, ["tokens"])
        tied = decoder.head.name == "embedding"
        # (tokens, width) where they lie flat, else (batch, sequence, width)
        stream = embedding(graph, "embedding", ids, decoder.embedding, self.ends, tied)
        if decoder.embedding_scale != 1.0:
            stream = graph.op("Mul", stream, graph.constant(decoder.embedding_scale))
        if decoder.positions is not None:
            stream = self._add_positions(stream)
        norms = [*(block.attention_norm for block in decoder.blocks), decoder.norm]
        normed = norm(graph, stream, norms[0])
        with track(len(decoder.blocks), "writing the graph", "blocks") as progress:
            for index, (block, following) in enumerate(zip(decoder.blocks, norms[1:], strict=True)):
                stream, normed = self._block(index, block, stream, normed, following)
                progress.advance()
        self._head(normed)
        bounds = [graph.constant([i]) for i in (-1, _END, 1)]
        graph.node("Slice", [self.logits, *bounds], [self.last_logits])

    def _head(self, normed: str) -> None:
        """Logits of the kept positions."""
        graph, head = self.graph, self.decoder.head
        flat = self.flat or form_of(head, self.ends) == "float"
        if flat and not self.flat:
            normed = flatten(graph, normed, self.width, "kept_tokens")
        logits = softcapped(graph, linear(graph, normed, head, self.ends), self.decoder.softcap)
        if flat:
            batch = graph.op("Shape", self.ids, end=1)
            shape = graph.op("Concat", batch, graph.constant([-1, head.outputs]), axis=0)
            graph.node("Reshape", [logits, shape], [self.logits])
        else:
            graph.rename(logits, self.logits)

    def _block(
        self, index: int, block: Block, stream: str, normed: str, following: Norm | None
    ) -> tuple[str, str]:
        """The stream after the block, and its norm for what follows."""
        graph, heads = self.graph, block.attention
        mixed = attention(graph, normed, index, heads, self.text, self.forms, self.cache[index])
        gathered = heads.heads * heads.head_width
        rows = "tokens"
        if index + 1 == len(self.decoder.blocks):
            rows = "kept_tokens"
            mixed = self._kept(mixed, gathered)
            stream = self._kept(unflatten(graph, stream, self.width, self.text.shape), self.width)
            if self.flat:
                stream = flatten(graph, stream, self.width, rows)
        if self.flat:
            mixed = flatten(graph, mixed, gathered, rows)
        added = norm(graph, linear(graph, mixed, heads.output, self.forms), block.attention_output_norm)
        if block.parallel:
            read = norm(graph, stream, block.mlp_norm)
            more = norm(graph, mlp(graph, read, block.mlp, self.forms), block.mlp_output_norm)
            return add_norm(graph, stream, graph.op("Add", added, more), following)
        stream, normed = add_norm(graph, stream, added, block.mlp_norm)
        added = norm(graph, mlp(graph, normed, block.mlp, self.forms), block.mlp_output_norm)
        return add_norm(graph, stream, added, following)

    def _kept(self, x: str, width: int) -> str:
        """(batch, sequence, width) -> each row's last `logits_to_keep` positions, or all for 0."""
        graph = self.graph
        if "kept" not in graph.shared:
            positions = self._upto_sequence()
            kept = graph.op("Slice", positions, graph.op("Neg", self.keep), graph.constant([_END]))  # (kept,)
            zero, one = graph.constant([0]), graph.constant([1])
            left_out = graph.op("Slice", kept, zero, one)  # (1,): how many
            padding = graph.op("Sub", self.sequence, graph.op("ReduceSum", self.real, one, keepdims=1))
            left = graph.op("Slice", self.order, zero, one, one)  # (batch, 1): of the padding
            back = graph.op("Min", padding, graph.op("Add", left_out, left))  # (batch, 1)
            # below 0, which counts from the end, in columns of padding only
            index = graph.op("Sub", kept, back)  # (batch, kept)
            graph.shared["kept"] = graph.op("Unsqueeze", index, graph.constant([-1]))
        rows = graph.op("GatherND", x, graph.shared["kept"], batch_dims=1)
        return graph.sized(rows, _FLOAT, ["batch", "kept", width])

    def _add_positions(self, stream: str) -> str:
        """Add each row's learned positions."""
        graph, table = self.graph, self.decoder.positions
        assert table is not None
        past = graph.op("Sub", self.lengths, self.sequence)  # below 0 for a padded prompt
        first = graph.op("Max", past, graph.constant([0]))  # (batch, 1)
        index = graph.op("Add", first, self._upto_sequence())  # (batch, sequence)
        rows = graph.op("Gather", graph.weight("positions", table.numpy()), index)
        return graph.op("Add", stream, flatten(graph, rows, self.width) if self.flat else rows)

    def _upto_sequence(self) -> str:
        """0 .. sequence - 1, int64."""
        graph = self.graph
        if "positions" not in graph.shared:
            bounds = graph.constant([0]), self.sequence
            graph.shared["positions"] = graph.op("Slice", counting(graph, self.decoder.context), *bounds)
        return graph.shared["positions"]
