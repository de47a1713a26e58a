"""What a decoder consists of, as data: read from a `transformers` model, written by `decoder.py`.

A reader per family (export/families/) turns its modules into the same few values; nothing after it knows a
model type. A new family is a new reader, as long as it is made of the parts below: token (and learned or
rotary) positions, blocks of attention and a plain or gated MLP one after the other or side by side, norms
before or after each, a final norm, a head.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from compress.formats import QuantizedTensor

Weight = Tensor | QuantizedTensor  # (out, in)


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b; W (out, in), b (out,). With `bounds` (2,) x is rounded to 256 values between them."""

    name: str
    weight: Weight
    bias: Tensor | None
    bounds: Tensor | None = None

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return int(self.weight.shape[0])

    def rows(self, name: str, rows: slice | Tensor) -> "Linear":
        """Some rows as a layer of its own; codes, scales and zero-points go along as they are."""
        weight, bias = self.weight, None if self.bias is None else self.bias[rows]
        if isinstance(weight, Tensor):
            return Linear(name, weight[rows], bias, self.bounds)
        codes = weight.codes[rows]
        part = QuantizedTensor(weight.format, (len(codes), weight.shape[1]))
        part.codes, part.scales = codes, weight.scales[rows]
        part.zeros = None if weight.zeros is None else weight.zeros[rows]
        return Linear(name, part, bias, self.bounds)


@dataclass(frozen=True)
class Norm:
    """RMS norm x / rms(x) * weight, or layer norm with a bias."""

    kind: Literal["rms", "layer"]
    name: str
    weight: Tensor
    bias: Tensor | None
    epsilon: float


@dataclass(frozen=True, eq=False)
class Rotary:
    """Angles of position p: p * frequencies (turned width / 2,); cos and sin are multiplied by `scaling`.

    Frequencies that are fewer than half a head's width turn the head's first columns only.
    """

    frequencies: Tensor
    scaling: float


@dataclass(frozen=True)
class Attention:
    """Causal attention.

    Attributes:
        query_norm: of each head or of all together, whichever is as wide as its weight; before turning.
        rotary: None where positions do not enter.
        window: how many tokens a position sees, itself included; None: all.
        softcap: scores s become softcap * tanh(s / softcap); None: as they are.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    head_width: int
    scale: float
    rotary: Rotary | None
    window: int | None = None
    softcap: float | None = None

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.query.outputs // self.head_width

    @property
    def cache_heads(self) -> int:
        """Key-value heads."""
        return self.key.outputs // self.head_width


@dataclass(frozen=True)
class Mlp:
    """down(act(up(x))), or down(act(gate(x)) * up(x))."""

    gate: Linear | None
    up: Linear
    down: Linear
    activation: str


@dataclass(frozen=True)
class Block:
    """h += out(attention(norm(h))), then h += out(mlp(norm(h))); `parallel`: both read the same h.

    A norm that is None leaves its input as it is. Two norms that are one object are computed once.
    """

    attention_norm: Norm | None
    attention: Attention
    mlp_norm: Norm | None
    mlp: Mlp
    attention_output_norm: Norm | None = None
    mlp_output_norm: Norm | None = None
    parallel: bool = False


@dataclass(frozen=True)
class Decoder:
    """A whole decoder. A tied head carries the name "embedding": weights of one name are stored once.

    Attributes:
        embedding: (vocabulary, width); its rows are multiplied by `embedding_scale`, a tied head's are not.
        positions: learned, (context, width).
        softcap: logits l become softcap * tanh(l / softcap); None: as they are.
    """

    model_type: str
    embedding: Weight
    positions: Tensor | None
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linear
    context: int
    embedding_scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        """Tokens in the vocabulary."""
        return int(self.embedding.shape[0])

    def matrices(self) -> list[Linear]:
        """Those of the blocks."""
        found: list[Linear | None] = []
        for block in self.blocks:
            attention, mlp = block.attention, block.mlp
            found += [attention.query, attention.key, attention.value, attention.output]
            found += [mlp.gate, mlp.up, mlp.down]
        return [layer for layer in found if layer is not None]
