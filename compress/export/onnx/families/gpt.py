"""GPT-2 and GPT-NeoX (Pythia): layer norms, a plain MLP, fused q,k,v.

GPT-2 has learned positions. GPT-NeoX turns part of each head; its fused
rows are (head, q k v, width); attention and MLP read the same stream through two norms, or one after the
other.
"""

from typing import Any

import torch

from compress.export.onnx.architecture import Block, Decoder
from compress.export.onnx.families.parts import (
    attention_from,
    cut,
    decoder,
    layer_norm,
    linear,
    plain_mlp,
    rotary,
)


def read_gpt2(model: Any) -> Decoder:
    """GPT-2."""
    config, body = model.config, model.transformer
    blocks = []
    for index, layer in enumerate(body.h):
        name = f"transformer.h.{index}"
        fused = linear(f"{name}.attn", layer.attn.c_attn)
        states = cut(fused, [(part, fused.outputs // 3) for part in "qkv"])
        blocks.append(
            Block(
                attention_norm=layer_norm(f"{name}.ln_1", layer.ln_1),
                attention=attention_from(states, f"{name}.attn", layer.attn, None, "c_proj"),
                mlp_norm=layer_norm(f"{name}.ln_2", layer.ln_2),
                mlp=plain_mlp(f"{name}.mlp", layer.mlp, "c_fc", "c_proj", config),
            )
        )
    positions = body.wpe.weight.detach().float().cpu()
    return decoder(model, body.wte, blocks, layer_norm("transformer.ln_f", body.ln_f), positions)


def read_gpt_neox(model: Any) -> Decoder:
    """GPT-NeoX and Pythia."""
    config, body = model.config, model.gpt_neox
    angles = rotary(body.rotary_emb)
    blocks = []
    for index, layer in enumerate(body.layers):
        name = f"gpt_neox.layers.{index}"
        attention = layer.attention
        fused = linear(f"{name}.attention", attention.query_key_value)
        rows = torch.arange(fused.outputs).view(-1, 3, attention.head_size)  # (heads, q k v, width)
        states = [fused.rows(f"{fused.name}.{part}", rows[:, i].reshape(-1)) for i, part in enumerate("qkv")]
        blocks.append(
            Block(
                attention_norm=layer_norm(f"{name}.input_layernorm", layer.input_layernorm),
                attention=attention_from(states, f"{name}.attention", attention, angles, "dense"),
                mlp_norm=layer_norm(f"{name}.post_attention_layernorm", layer.post_attention_layernorm),
                mlp=plain_mlp(f"{name}.mlp", layer.mlp, "dense_h_to_4h", "dense_4h_to_h", config),
                parallel=bool(layer.use_parallel_residual),
            )
        )
    norm = layer_norm("gpt_neox.final_layer_norm", body.final_layer_norm)
    return decoder(model, body.embed_in, blocks, norm)
