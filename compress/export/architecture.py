"""What a decoder consists of, as data: read from a `transformers` model, written by `decoder.py`.

One reader per family turns its modules into the same few values; nothing after this file knows a model
type. A new family is a new reader, as long as it is made of the parts below: token (and learned or
rotary) positions, pre-norm blocks of attention and a plain or gated MLP, a final norm, a head.

Limits: rotary embeddings whose angles are one table (default, linear, llama3, yarn); those that change
with the length of the text (dynamic, longrope) are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.formats import QuantizedEmbedding, QuantizedLinear, QuantizedTensor

Weight = Tensor | QuantizedTensor  # (out, in)


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b; W (out, in), b (out,)."""

    name: str
    weight: Weight
    bias: Tensor | None

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return int(self.weight.shape[0])


@dataclass(frozen=True)
class Norm:
    """RMS norm x / rms(x) * weight, or layer norm with a bias."""

    kind: Literal["rms", "layer"]
    name: str
    weight: Tensor
    bias: Tensor | None
    epsilon: float


@dataclass(frozen=True)
class Attention:
    """Causal attention; `window` is how many tokens a position sees, itself included (None: all)."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    head_width: int
    scale: float
    window: int | None

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
    """h += attention(norm(h)); h += mlp(norm(h))."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp


@dataclass(frozen=True)
class Rotary:
    """Angles of position p: p * frequencies (head_width / 2,); cos and sin are multiplied by `scaling`."""

    frequencies: Tensor
    scaling: float


@dataclass(frozen=True)
class Decoder:
    """A whole decoder. A tied head carries the name "embedding": weights of one name are stored once."""

    model_type: str
    embedding: Weight  # (vocabulary, width)
    positions: Tensor | None  # learned, (context, width)
    rotary: Rotary | None
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linear
    context: int

    @property
    def vocabulary(self) -> int:
        """Tokens in the vocabulary."""
        return int(self.embedding.shape[0])


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


def require_supported(config: Any) -> None:
    """Raise UserError, before any work, for a model this export cannot describe."""
    if config.model_type not in _READERS:
        raise UserError(
            f"export_onnx: model_type '{config.model_type}' is not supported; supported: "
            + ", ".join(sorted(_READERS))
            + "; leave export_onnx out of the recipe to have it in torch only"
        )
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", "")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"export_onnx: activation '{activation}' is not supported; supported: "
            + ", ".join(sorted(ACTIVATIONS))
        )
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type", "default") not in _FIXED_ROTARY:
        raise UserError(
            f"export_onnx: rope_type '{rotary['rope_type']}' changes with the text's length and is not "
            f"supported; supported: {', '.join(_FIXED_ROTARY)}"
        )
    if rotary.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("export_onnx: partial_rotary_factor is not supported; only 1.0 is")


def describe(model: nn.Module) -> Decoder:
    """Read a decoder off its modules. Raises UserError as `require_supported` does."""
    require_supported(model.config)
    with torch.no_grad():
        return _READERS[str(model.config.model_type)](model)  # type: ignore[union-attr]


def _read_llama(model: Any) -> Decoder:
    """Llama, Mistral, Qwen2 and Qwen3 share their module names."""
    config, body = model.config, model.model
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    blocks = []
    for index, layer in enumerate(body.layers):
        name = f"model.layers.{index}"
        attention, mlp = layer.self_attn, layer.mlp
        sliding = layer_types is None or layer_types[index] == "sliding_attention"
        blocks.append(
            Block(
                attention_norm=_rms(f"{name}.input_layernorm", layer.input_layernorm),
                attention=Attention(
                    query=read_linear(f"{name}.self_attn.q_proj", attention.q_proj),
                    key=read_linear(f"{name}.self_attn.k_proj", attention.k_proj),
                    value=read_linear(f"{name}.self_attn.v_proj", attention.v_proj),
                    output=read_linear(f"{name}.self_attn.o_proj", attention.o_proj),
                    query_norm=_head_norm(f"{name}.self_attn.q_norm", attention, "q_norm"),
                    key_norm=_head_norm(f"{name}.self_attn.k_norm", attention, "k_norm"),
                    head_width=int(attention.head_dim),
                    scale=float(attention.scaling),
                    window=window if sliding else None,
                ),
                mlp_norm=_rms(f"{name}.post_attention_layernorm", layer.post_attention_layernorm),
                mlp=Mlp(
                    gate=read_linear(f"{name}.mlp.gate_proj", mlp.gate_proj),
                    up=read_linear(f"{name}.mlp.up_proj", mlp.up_proj),
                    down=read_linear(f"{name}.mlp.down_proj", mlp.down_proj),
                    activation=ACTIVATIONS[config.hidden_act],
                ),
            )
        )
    embedding = _table(body.embed_tokens)
    rotary = body.rotary_emb
    return Decoder(
        model_type=config.model_type,
        embedding=embedding,
        positions=None,
        rotary=Rotary(rotary.inv_freq.detach().float().cpu(), float(rotary.attention_scaling)),
        blocks=tuple(blocks),
        norm=_rms("model.norm", body.norm),
        head=_head(model.lm_head, embedding),
        context=int(config.max_position_embeddings),
    )


def _read_gpt2(model: Any) -> Decoder:
    """GPT-2: learned positions, layer norms, fused q,k,v; its linear layers hold (in, out)."""
    config, body = model.config, model.transformer
    if config.add_cross_attention or config.scale_attn_by_inverse_layer_idx:
        raise UserError("export_onnx: GPT-2 with cross attention or scaling by layer is not supported")
    blocks = []
    for index, layer in enumerate(body.h):
        name = f"transformer.h.{index}"
        query, key, value = _thirds(f"{name}.attn", layer.attn.c_attn)
        blocks.append(
            Block(
                attention_norm=_layer_norm(f"{name}.ln_1", layer.ln_1),
                attention=Attention(
                    query=query,
                    key=key,
                    value=value,
                    output=read_linear(f"{name}.attn.c_proj", layer.attn.c_proj),
                    query_norm=None,
                    key_norm=None,
                    head_width=int(layer.attn.head_dim),
                    scale=float(layer.attn.scaling),
                    window=None,
                ),
                mlp_norm=_layer_norm(f"{name}.ln_2", layer.ln_2),
                mlp=Mlp(
                    gate=None,
                    up=read_linear(f"{name}.mlp.c_fc", layer.mlp.c_fc),
                    down=read_linear(f"{name}.mlp.c_proj", layer.mlp.c_proj),
                    activation=ACTIVATIONS[config.activation_function],
                ),
            )
        )
    embedding = _table(body.wte)
    return Decoder(
        model_type=config.model_type,
        embedding=embedding,
        positions=body.wpe.weight.detach().float().cpu(),
        rotary=None,
        blocks=tuple(blocks),
        norm=_layer_norm("transformer.ln_f", body.ln_f),
        head=_head(model.lm_head, embedding),
        context=int(config.n_positions),
    )


_READERS: dict[str, Callable[[Any], Decoder]] = {
    "llama": _read_llama,
    "mistral": _read_llama,
    "qwen2": _read_llama,
    "qwen3": _read_llama,
    "gpt2": _read_gpt2,
}


def read_linear(name: str, module: Any) -> Linear:
    """A layer off its module: `Linear`, GPT-2's `Conv1D`, or one that holds codes."""
    bias = None if module.bias is None else module.bias.detach().float().cpu()
    if isinstance(module, QuantizedLinear):
        return Linear(name, module.quantized, bias)
    weight = module.weight.detach().float().cpu()
    return Linear(name, weight if isinstance(module, nn.Linear) else weight.T, bias)  # Conv1D: (in, out)


def _thirds(name: str, module: Any) -> tuple[Linear, Linear, Linear]:
    """Split a fused q,k,v layer into its three row ranges."""
    fused = read_linear(name, module)
    size = fused.outputs // 3
    q, k, v = (
        Linear(
            f"{name}.{letter}",
            _rows(fused.weight, i * size, size),
            None if fused.bias is None else fused.bias[i * size : (i + 1) * size],
        )
        for i, letter in enumerate("qkv")
    )
    return q, k, v


def _rows(weight: Weight, start: int, count: int) -> Weight:
    if isinstance(weight, Tensor):
        return weight[start : start + count]
    part = QuantizedTensor(weight.format, (count, weight.shape[1]))
    part.codes, part.scales = weight.codes[start : start + count], weight.scales[start : start + count]
    part.zeros = None if weight.zeros is None else weight.zeros[start : start + count]
    return part


def _table(module: Any) -> Weight:
    if isinstance(module, QuantizedEmbedding):
        if module.scale != 1.0:
            raise UserError("export_onnx: embeddings that are scaled are not supported")
        return module.quantized
    table: Tensor = module.weight  # the parameter itself, so that a tied head can be recognised
    return table.detach()


def _head(module: Any, embedding: Weight) -> Linear:
    if isinstance(module, QuantizedLinear) or isinstance(embedding, QuantizedTensor):
        tied = getattr(module, "quantized", None) is embedding
    else:
        tied = module.weight.data_ptr() == embedding.data_ptr()
    return read_linear("embedding" if tied else "lm_head", module)


def _rms(name: str, module: Any) -> Norm:
    return Norm("rms", name, module.weight.detach().float().cpu(), None, float(module.variance_epsilon))


def _head_norm(name: str, attention: Any, attribute: str) -> Norm | None:
    return _rms(name, getattr(attention, attribute)) if hasattr(attention, attribute) else None


def _layer_norm(name: str, module: Any) -> Norm:
    weight, bias = module.weight.detach().float().cpu(), module.bias.detach().float().cpu()
    return Norm("layer", name, weight, bias, float(module.eps))
