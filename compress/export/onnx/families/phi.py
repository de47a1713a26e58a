"""Phi and Phi-3.

Phi: one layer norm, from which attention and a plain MLP read side by side; part of a head is turned.
Phi-3: Llama with q,k,v and gate,up fused, whose rows are cut apart here.
"""

from typing import Any

from compress.export.onnx.architecture import Block, Decoder, Mlp
from compress.export.onnx.families.parts import (
    ACTIVATIONS,
    activation_name,
    attention_from,
    attention_of,
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
        norms = {"query_norm": "q_layernorm", "key_norm": "k_layernorm"} if config.qk_layernorm else {}
        norm = layer_norm(f"{name}.input_layernorm", layer.input_layernorm)
        blocks.append(
            Block(
                attention_norm=norm,
                attention=attention_of(
                    path,
                    attention,
                    angles,
                    "dense",
                    **{field: layer_norm(f"{path}.{x}", getattr(attention, x)) for field, x in norms.items()},
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
        states = cut(fused, (("q", fused.outputs - 2 * key_rows), ("k", key_rows), ("v", key_rows)))
        both = linear(f"{name}.mlp.gate_up_proj", mlp.gate_up_proj)
        gate, up = cut(both, (("gate", both.outputs // 2), ("up", both.outputs // 2)))
        blocks.append(
            Block(
                attention_norm=rms(f"{name}.input_layernorm", layer.input_layernorm),
                attention=attention_from(
                    states, f"{name}.self_attn", attention, angles, "o_proj", window=window(config, index)
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
