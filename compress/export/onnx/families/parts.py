"""Modules of `transformers` as parts of a description: what the readers of all families share.

A layer that holds codes gives its codes; everything else is taken to float32. Layers that a checkpoint
keeps fused (q,k,v; gate,up) are cut into their rows here, codes and all: what the graph fuses again is
decided where it is written.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from compress.export.onnx.architecture import Attention, Block, Decoder, Linear, Mlp, Norm, Rotary, Weight
from compress.formats import QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from compress.formats.swap import embedding_scale
from compress.models.attention import window_size

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def activation_name(config: Any) -> str:
    """The configuration's name for the activation inside the MLP, wherever a family keeps it."""
    fields = ("hidden_act", "hidden_activation", "activation_function")
    return next((name for field in fields if (name := getattr(config, field, None))), "")


def linear(name: str, module: Any) -> Linear:
    """A linear layer, float or coded."""
    bias = None if module.bias is None else module.bias.detach().float().cpu()
    if isinstance(module, QuantizedLinear):
        return Linear(name, module.quantized, bias, module.activation_bounds)
    return Linear(name, module.weight.detach().float().cpu(), bias)


def cut(fused: Linear, pieces: Sequence[tuple[str, int]]) -> list[Linear]:
    """A fused layer's consecutive ranges of rows: names and numbers of rows."""
    layers, start = [], 0
    for name, count in pieces:
        layers.append(fused.rows(f"{fused.name}.{name}", slice(start, start + count)))
        start += count
    return layers


def rms(name: str, module: Any) -> Norm:
    """An RMS norm whose gain is its weight."""
    return Norm("rms", name, module.weight.detach().float().cpu(), None, float(module.variance_epsilon))


def layer_norm(name: str, module: Any) -> Norm:
    """A layer norm."""
    bias = None if module.bias is None else module.bias.detach().float().cpu()
    return Norm("layer", name, module.weight.detach().float().cpu(), bias, float(module.eps))


def rotary(module: Any, kind: str = "") -> Rotary:
    """The angles of a rotary module; `kind` is the layer type of a module that holds several."""
    prefix = f"{kind}_" if kind else ""
    frequencies = getattr(module, f"{prefix}inv_freq").detach().float().cpu()
    return Rotary(frequencies, float(getattr(module, f"{prefix}attention_scaling")))


def window(config: Any, index: int) -> int | None:
    """How many tokens a position of block `index` sees; None for all."""
    size = window_size(config)
    types = getattr(config, "layer_types", None)
    return size if types is None or types[index] == "sliding_attention" else None


def attention_of(
    name: str, module: Any, angles: Rotary | None, output: str = "o_proj", **more: Any
) -> Attention:
    """Attention of projections under Llama's names; `more` are fields of `Attention`."""
    states = [linear(f"{name}.{part}", getattr(module, part)) for part in ("q_proj", "k_proj", "v_proj")]
    return attention_from(states, name, module, angles, output, **more)


def attention_from(
    states: Iterable[Linear], name: str, module: Any, angles: Rotary | None, output: str, **more: Any
) -> Attention:
    """Attention of query, key and value, and a projection of what heads gather that is called `output`."""
    query, key, value = states
    width = module.head_dim if hasattr(module, "head_dim") else module.head_size
    return Attention(
        query=query,
        key=key,
        value=value,
        output=linear(f"{name}.{output}", getattr(module, output)),
        head_width=int(width),
        scale=float(module.scaling),
        rotary=angles,
        **{"query_norm": None, "key_norm": None, **more},
    )


def gated_mlp(name: str, module: Any, config: Any) -> Mlp:
    """A gated MLP under Llama's names."""
    return Mlp(
        gate=linear(f"{name}.gate_proj", module.gate_proj),
        up=linear(f"{name}.up_proj", module.up_proj),
        down=linear(f"{name}.down_proj", module.down_proj),
        activation=ACTIVATIONS[activation_name(config)],
    )


def plain_mlp(name: str, module: Any, up: str, down: str, config: Any) -> Mlp:
    """An MLP without a gate; `up` and `down` are what its two layers are called."""
    return Mlp(
        gate=None,
        up=linear(f"{name}.{up}", getattr(module, up)),
        down=linear(f"{name}.{down}", getattr(module, down)),
        activation=ACTIVATIONS[activation_name(config)],
    )


def decoder(
    model: Any,
    table: Any,
    blocks: Sequence[Block],
    norm: Norm,
    positions: Tensor | None = None,
    softcap: float | None = None,
) -> Decoder:
    """The whole model; `table` is the module that holds the token embedding."""
    if isinstance(table, QuantizedEmbedding):
        embedding: Weight = table.quantized
        scale = table.scale
    else:
        embedding = table.weight.detach()  # the parameter itself, so that a tied head can be recognised
        scale = embedding_scale(table)
    return Decoder(
        model_type=str(model.config.model_type),
        embedding=embedding,
        positions=positions,
        blocks=tuple(blocks),
        norm=norm,
        head=_head(model.lm_head, embedding),
        context=int(model.config.max_position_embeddings),
        embedding_scale=scale,
        softcap=softcap,
    )


def _head(module: Any, embedding: Weight) -> Linear:
    if isinstance(module, QuantizedLinear) or isinstance(embedding, QuantizedTensor):
        tied = getattr(module, "quantized", None) is embedding
    else:
        tied = module.weight.data_ptr() == embedding.data_ptr()
    return linear("embedding" if tied else "lm_head", module)
