"""A decoder as one ONNX graph, with a key-value cache and its logits where they are wanted.

Inputs   input_ids int64 (batch, sequence);
         attention_mask int64 (batch, past + sequence): 1 for a token, 0 for padding;
         past_key_values.<i>.key and .value float32 or int8 (batch, heads, past, width);
         logits_to_keep int64 (1,): how many positions, counted from the last, get logits; 0 means all;
         1 unless given.
Outputs  logits float32 (batch, kept, vocabulary); present.<i>.key and .value;
         last_logits (batch, 1, vocabulary): those of the last position, for callers that read its shape.

The names are those of `optimum` and `onnxruntime-genai`. The cache may be one buffer given as past and
present, which is then appended to in place. Tokens of a batch lie flat, (batch * sequence, width), except
inside attention. Rows that are not asked for leave after the last attention, so a prompt pays neither the
last MLP nor the head for them.

Prompts of different lengths in one batch are padded on the right. Of the mask only each row's number of
ones counts: with n ones a row stands at position n - 1 after the call, so a decoded token overwrites the
first padding in the cache and gets that position, and "the last" logits of a row are those of its own last
token. A row shorter than logits_to_keep gets its first positions, with padding behind them.
Limit: padding may stand in the first call for a text only, not in a later one of several tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from compress.export.onnx.architecture import Block, Decoder, Norm
from compress.export.onnx.attention import CacheScales, Positions, attention
from compress.export.onnx.embedding import embedding
from compress.export.onnx.forms import Forms
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
        self.ids = graph.input("input_ids", _INT64, ["batch", "sequence"])
        self.mask = graph.input("attention_mask", _INT64, ["batch", "total"])
        self.keep = graph.input("logits_to_keep", _INT64, [1], default=np.asarray([1]))
        self.logits = graph.output("logits", _FLOAT, ["batch", "kept", decoder.vocabulary])
        self.last_logits = graph.output("last_logits", _FLOAT, ["batch", 1, decoder.vocabulary])
        self.lengths = graph.op("ReduceSum", self.mask, graph.constant([1]), keepdims=1)  # (batch, 1)
        self.total = graph.op("Shape", self.mask, start=1)  # (1,)
        self.sequence = graph.op("Shape", self.ids, start=1)  # (1,)
        last = graph.op("Sub", self.lengths, graph.constant([1]))
        self.text = Positions(
            shape=graph.op("Shape", self.ids),
            last=graph.op("Cast", last, to=_INT32),
            total=graph.op("Cast", self.total, to=_INT32),
            context=decoder.context,
        )

    def write(self) -> None:
        """The graph from ids to logits."""
        graph, decoder = self.graph, self.decoder
        flat_ids = graph.sized(graph.op("Reshape", self.ids, graph.constant([-1])), _INT64, ["tokens"])
        tied = decoder.head.name == "embedding"
        stream = embedding(
            graph, "embedding", flat_ids, decoder.embedding, self.ends, tied
        )  # (tokens, width)
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
        logits = softcapped(graph, linear(graph, normed, decoder.head, self.ends), decoder.softcap)
        batch = graph.op("Shape", self.ids, end=1)
        shape = graph.op("Concat", batch, graph.constant([-1, decoder.vocabulary]), axis=0)
        graph.node("Reshape", [logits, shape], [self.logits])
        bounds = [graph.constant([i]) for i in (-1, _END, 1)]
        graph.node("Slice", [self.logits, *bounds], [self.last_logits])

    def _block(
        self, index: int, block: Block, stream: str, normed: str, following: Norm | None
    ) -> tuple[str, str]:
        """The stream (tokens, width) after the block, and its norm for what follows."""
        graph, heads = self.graph, block.attention
        mixed = attention(graph, normed, index, heads, self.text, self.forms, self.cache[index])
        rows = "tokens"
        if index + 1 == len(self.decoder.blocks):
            rows = "kept_tokens"
            mixed = self._kept(mixed)
            kept = self._kept(unflatten(graph, stream, self.width, self.text.shape))
            stream = flatten(graph, kept, self.width, rows)
        mixed = flatten(graph, mixed, heads.heads * heads.head_width, rows)
        added = norm(graph, linear(graph, mixed, heads.output, self.forms), block.attention_output_norm)
        if block.parallel:
            read = norm(graph, stream, block.mlp_norm)
            more = norm(graph, mlp(graph, read, block.mlp, self.forms), block.mlp_output_norm)
            return add_norm(graph, stream, graph.op("Add", added, more), following)
        stream, normed = add_norm(graph, stream, added, block.mlp_norm)
        added = norm(graph, mlp(graph, normed, block.mlp, self.forms), block.mlp_output_norm)
        return add_norm(graph, stream, added, following)

    def _kept(self, x: str) -> str:
        """(batch, sequence, width) -> each row's last `logits_to_keep` positions, or all for 0."""
        graph = self.graph
        if "kept" not in graph.shared:
            positions = self._upto_sequence()
            kept = graph.op("Slice", positions, graph.op("Neg", self.keep), graph.constant([_END]))  # (kept,)
            left_out = graph.op("Slice", kept, graph.constant([0]), graph.constant([1]))  # (1,): how many
            padding = graph.op("Sub", self.total, self.lengths)
            # in a call of one token there is nothing to go back over: left_out is 0
            back = graph.op("Min", padding, left_out)  # (batch, 1)
            index = graph.op("Sub", kept, back)  # (batch, kept)
            graph.shared["kept"] = graph.op("Unsqueeze", index, graph.constant([-1]))
        return graph.op("GatherND", x, graph.shared["kept"], batch_dims=1)

    def _add_positions(self, stream: str) -> str:
        """Add each row's learned positions to (batch * sequence, width)."""
        graph, table = self.graph, self.decoder.positions
        assert table is not None
        past = graph.op("Sub", self.lengths, self.sequence)  # below 0 for a padded prompt
        first = graph.op("Max", past, graph.constant([0]))  # (batch, 1)
        index = graph.op("Add", first, self._upto_sequence())  # (batch, sequence)
        rows = graph.op("Gather", graph.weight("positions", table.numpy()), index)
        return graph.op("Add", stream, flatten(graph, rows, self.width))

    def _upto_sequence(self) -> str:
        """0 .. sequence - 1, int64."""
        graph = self.graph
        if "positions" not in graph.shared:
            bounds = graph.constant([0]), self.sequence
            graph.shared["positions"] = graph.op("Slice", counting(graph, self.decoder.context), *bounds)
        return graph.shared["positions"]
