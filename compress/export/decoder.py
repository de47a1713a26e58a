"""A decoder as one ONNX graph, with a key-value cache and its logits where they are wanted.

Inputs   input_ids int64 (batch, sequence); attention_mask int64 (batch, past + sequence), all ones;
         past_key_values.<i>.key and .value float32 (batch, heads, past, width);
         logits_to_keep int64 (1,): how many positions, counted from the last, get logits; 0 means all;
         1 unless given.
Outputs  logits float32 (batch, kept, vocabulary); present.<i>.key and .value.

The names are those of `optimum` and `onnxruntime-genai`. Attention is `GroupQueryAttention`, which may be
given one buffer as past and present and then appends to it in place. Tokens of a batch lie flat, (batch *
sequence, width), except inside attention. Rows that are not asked for leave after the last attention, so a
prompt pays neither the last MLP nor the head for them.
Limit: rows of a batch have equal lengths (no padding).
"""

import numpy as np

from compress.export.architecture import Attention, Block, Decoder, Mlp, Norm, Rotary
from compress.export.embedding import embedding
from compress.export.graph import MICROSOFT, GraphBuilder
from compress.export.linear import Forms, linear, stack, stackable

_FLOAT, _INT32, _INT64 = 1, 6, 7
_END = 2**63 - 1


def write_decoder(graph: GraphBuilder, decoder: Decoder, forms: Forms) -> None:
    """Describe the whole decoder to `graph`."""
    _Writer(graph, decoder, forms).write()


class _Writer:
    """Holds the values that every block reads."""

    def __init__(self, graph: GraphBuilder, decoder: Decoder, forms: Forms) -> None:
        self.graph, self.decoder, self.forms = graph, decoder, forms
        self.ids = graph.input("input_ids", _INT64, ["batch", "sequence"])
        self.mask = graph.input("attention_mask", _INT64, ["batch", "total"])
        self.keep = graph.input("logits_to_keep", _INT64, [1], default=np.asarray([1]))
        self.logits = graph.output("logits", _FLOAT, ["batch", "kept", decoder.vocabulary])
        one, zero = graph.constant([1]), graph.constant([0])
        lengths = graph.op("ReduceSum", self.mask, one, keepdims=0)
        self.last = graph.op("Cast", graph.op("Sub", lengths, one), to=_INT32)  # (batch,)
        total = graph.op("Gather", graph.op("Shape", self.mask), graph.constant(np.asarray(1)), axis=0)
        self.total64 = total
        self.total = graph.op("Cast", total, to=_INT32)
        self.sequence = graph.op("Shape", self.ids)  # [batch, sequence]
        self.zero = zero
        self.rotary: tuple[str, ...] = ()
        if decoder.rotary is not None:
            self.rotary = _rotary_tables(graph, decoder.rotary, decoder.context)

    def write(self) -> None:
        """The graph from ids to logits."""
        graph, decoder = self.graph, self.decoder
        flat_ids = graph.op("Reshape", self.ids, graph.constant([-1]))
        tied = decoder.head.name == "embedding"
        stream = embedding(
            graph, "embedding", flat_ids, decoder.embedding, self.forms, tied
        )  # (tokens, width)
        if decoder.positions is not None:
            stream = self._add_positions(stream)
        normed = self._norm(stream, decoder.blocks[0].attention_norm if decoder.blocks else decoder.norm)
        for index, block in enumerate(decoder.blocks):
            is_last = index + 1 == len(decoder.blocks)
            following = decoder.norm if is_last else decoder.blocks[index + 1].attention_norm
            stream, normed = self._block(index, block, stream, normed, following, is_last)
        logits = linear(graph, normed, decoder.head, self.forms)
        batch = graph.op("Slice", self.sequence, self.zero, graph.constant([1]))
        shape = graph.op("Concat", batch, graph.constant([-1, decoder.vocabulary]), axis=0)
        graph.node("Reshape", [logits, shape], [self.logits])

    def _block(
        self, index: int, block: Block, stream: str, normed: str, following: Norm, is_last: bool
    ) -> tuple[str, str]:
        mixed = self._attention(index, block.attention, normed)
        width = int(block.mlp_norm.weight.shape[0])
        if is_last:
            mixed = self._kept(mixed)
            stream = self._flatten(self._kept(self._unflatten(stream, width)), width)
        mixed = self._flatten(mixed, block.attention.heads * block.attention.head_width)
        mixed = linear(self.graph, mixed, block.attention.output, self.forms)
        stream, normed = self._add_norm(stream, mixed, block.mlp_norm)
        return self._add_norm(stream, self._mlp(block.mlp, normed), following)

    def _attention(self, index: int, attention: Attention, x: str) -> str:
        graph = self.graph
        past, present = [], []
        shape: list[int | str] = ["batch", attention.cache_heads, "past", attention.head_width]
        grown: list[int | str] = ["batch", attention.cache_heads, "present", attention.head_width]
        for part in ("key", "value"):
            past.append(graph.input(f"past_key_values.{index}.{part}", _FLOAT, shape))
            present.append(graph.output(f"present.{index}.{part}", _FLOAT, grown))
        query, key, value = attention.query, attention.key, attention.value
        if attention.query_norm is None and stackable((query, key, value), self.forms):
            layer = stack((query, key, value), f"layers.{index}.qkv")
            states = [self._unflatten(linear(graph, x, layer, self.forms), layer.outputs), "", ""]
        else:
            norms = (attention.query_norm, attention.key_norm, None)
            states = []
            for layer, norm in zip((query, key, value), norms, strict=True):
                y = linear(graph, x, layer, self.forms)
                if norm is not None:
                    heads = graph.op("Reshape", y, graph.constant([-1, attention.head_width]))
                    y = self._norm(heads, norm)  # per head; the reshape below puts heads side by side again
                states.append(self._unflatten(y, layer.outputs))
        attributes: dict[str, int | float] = {
            "num_heads": attention.heads,
            "kv_num_heads": attention.cache_heads,
            "scale": attention.scale,
            "do_rotary": int(bool(self.rotary)),
        }
        if attention.window is not None:
            attributes["local_window_size"] = attention.window
        mixed = graph.node(
            "GroupQueryAttention",
            [*states, *past, self.last, self.total, *self.rotary],
            [f"attention.{index}", *present],
            MICROSOFT,
            **attributes,
        )[0]  # (batch, sequence, heads * width)
        return mixed

    def _mlp(self, mlp: Mlp, x: str) -> str:
        graph = self.graph
        up = linear(graph, x, mlp.up, self.forms)
        if mlp.gate is None:
            inner = self._activate(mlp.activation, up)
        else:
            gate = linear(graph, x, mlp.gate, self.forms)
            inner = graph.op("Mul", self._activate(mlp.activation, gate), up)
        return linear(graph, inner, mlp.down, self.forms)

    def _activate(self, activation: str, x: str) -> str:
        if activation == "silu":
            return self.graph.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0)  # x * sigmoid(1.0 * x)
        if activation == "relu":
            return self.graph.op("Relu", x)
        return self.graph.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")

    def _norm(self, x: str, norm: Norm) -> str:
        weight = self._gain(norm)
        if norm.kind == "rms":
            return self.graph.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=norm.epsilon)
        bias = self._bias(norm)
        return self.graph.op("LayerNormalization", x, weight, *bias, axis=-1, epsilon=norm.epsilon)

    def _add_norm(self, stream: str, x: str, norm: Norm) -> tuple[str, str]:
        """(stream + x, norm(stream + x)) in one node."""
        rms = norm.kind == "rms"
        results = self.graph.node(
            "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization",
            [stream, x, self._gain(norm), *([] if rms else self._bias(norm))],
            [f"{norm.name}.normed", "", "", f"{norm.name}.sum"],
            MICROSOFT,
            epsilon=norm.epsilon,
        )
        return results[3], results[0]

    def _gain(self, norm: Norm) -> str:
        return self.graph.weight(f"{norm.name}.weight", norm.weight.numpy())

    def _bias(self, norm: Norm) -> list[str]:
        return [] if norm.bias is None else [self.graph.weight(f"{norm.name}.bias", norm.bias.numpy())]

    def _unflatten(self, x: str, width: int) -> str:
        """(batch * sequence, width) -> (batch, sequence, width)."""
        key = ("unflatten", width)
        if key not in self.graph.shared:
            parts = self.sequence, self.graph.constant([width])
            self.graph.shared[key] = self.graph.op("Concat", *parts, axis=0)
        return self.graph.op("Reshape", x, self.graph.shared[key])

    def _flatten(self, x: str, width: int) -> str:
        """(batch, sequence, width) -> (batch * sequence, width)."""
        return self.graph.op("Reshape", x, self.graph.constant([-1, width]))

    def _kept(self, x: str) -> str:
        """(batch, sequence, width) -> the last `logits_to_keep` positions, or all for 0."""
        graph = self.graph
        if "keep from" not in graph.shared:
            graph.shared["keep from"] = graph.op("Neg", self.keep)
        return graph.op("Slice", x, graph.shared["keep from"], graph.constant([_END]), graph.constant([1]))

    def _add_positions(self, stream: str) -> str:
        """Add the learned positions past .. total - 1 to (batch * sequence, width)."""
        graph, table = self.graph, self.decoder.positions
        assert table is not None
        width = int(table.shape[1])
        sequence = graph.op("Gather", self.sequence, graph.constant(np.asarray(1)), axis=0)
        past = graph.op("Sub", self.total64, sequence)
        index = graph.op("Range", past, self.total64, graph.constant(np.asarray(1)))
        rows = graph.op("Gather", graph.weight("positions", table.numpy()), index)  # (sequence, width)
        return self._flatten(graph.op("Add", self._unflatten(stream, width), rows), width)


def _rotary_tables(graph: GraphBuilder, rotary: Rotary, context: int) -> tuple[str, str]:
    """cos and sin (context, head_width / 2). Their nodes have no inputs: they are folded at load, and the
    file holds the frequencies only."""
    positions = graph.op("Range", *(graph.constant(np.asarray(i)) for i in (0, context, 1)))
    column = graph.op("Reshape", graph.op("Cast", positions, to=_FLOAT), graph.constant([-1, 1]))
    angles = graph.op("Mul", column, graph.constant(rotary.frequencies.numpy()))
    scaling = graph.constant(rotary.scaling)
    cos, sin = (graph.op("Mul", graph.op(name, angles), scaling) for name in ("Cos", "Sin"))
    return cos, sin
