"""Phi and Phi-3.

Phi: one layer norm, from which attention and a plain MLP read side by side; part of a head is turned.
Phi-3: Llama with q,k,v and gate,up fused, whose rows are cut apart here.
"""

from typing import Any

from compress.export.onnx.architecture import Attention, Block, Decoder, Mlp
from compress.export.onnx.families.parts import (
    ACTIVATIONS,
    activation_name,
    cut,
    decoder,
    layer_norm,
    linear,
    plain_mlp,
    rms,
    rotary,
    window,
)


def read_phi(model: Any) -> Decoder:
    """Phi 1, 1.5 and 2."""
    config, body = model.config, model.model
    angles = rotary(body.rotary_emb)
    blocks = []
    for index, layer in enumerate(body.layers):
        name = f"model.layers.{index}"
        attention, path = layer.self_attn, f"{name}.self_attn"
        normed = config.qk_layernorm
        norm = layer_norm(f"{name}.input_layernorm", layer.input_layernorm)
        blocks.append(
            Block(
                attention_norm=norm,
                attention=Attention(
                    query=linear(f"{path}.q_proj", attention.q_proj),
                    key=linear(f"{path}.k_proj", attention.k_proj),
                    value=linear(f"{path}.v_proj", attention.v_proj),
                    output=linear(f"{path}.dense", attention.dense),
                    query_norm=layer_norm(f"{path}.q_layernorm", attention.q_layernorm) if normed else None,
                    key_norm=layer_norm(f"{path}.k_layernorm", attention.k_layernorm) if normed else None,
                    head_width=int(attention.head_dim),
                    scale=float(attention.scaling),
                    rotary=angles,
                ),
                mlp_norm=norm,
                mlp=plain_mlp(f"{name}.mlp", layer.mlp, "fc1", "fc2", config),
                parallel=True,
            )
        )
    return decoder(
        model, body.embed_tokens, blocks, layer_norm("model.final_layernorm", body.final_layernorm)
    )


def read_phi3(model: Any) -> Decoder:
    """Phi-3, Phi-3.5 and Phi-4 whose angles do not change with the text's length."""
    config, body = model.config, model.model
    angles = rotary(body.rotary_emb)
    blocks = []
    for index, layer in enumerate(body.layers):
        name = f"model.layers.{index}"
        attention, mlp = layer.self_attn, layer.mlp
        fused = linear(f"{name}.self_attn.qkv_proj", attention.qkv_proj)
        key_rows = int(attention.num_key_value_heads * attention.head_dim)
        query, key, value = cut(
            fused, (("q", fused.outputs - 2 * key_rows), ("k", key_rows), ("v", key_rows))
        )
        both = linear(f"{name}.mlp.gate_up_proj", mlp.gate_up_proj)
        gate, up = cut(both, (("gate", both.outputs // 2), ("up", both.outputs // 2)))
        blocks.append(
            Block(
                attention_norm=rms(f"{name}.input_layernorm", layer.input_layernorm),
                attention=Attention(
                    query=query,
                    key=key,
                    value=value,
                    output=linear(f"{name}.self_attn.o_proj", attention.o_proj),
                    query_norm=None,
                    key_norm=None,
                    head_width=int(attention.head_dim),
                    scale=float(attention.scaling),
                    rotary=angles,
                    window=window(config, index),
                ),
                mlp_norm=rms(f"{name}.post_attention_layernorm", layer.post_attention_layernorm),
                mlp=Mlp(
                    gate=gate,
                    up=up,
                    down=linear(f"{name}.mlp.down_proj", mlp.down_proj),
                    activation=ACTIVATIONS[activation_name(config)],
                ),
            )
        )
    return decoder(model, body.embed_tokens, blocks, rms("model.norm", body.norm))
