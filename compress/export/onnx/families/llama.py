"""Llama, Mistral, Qwen 2, Qwen 3, SmolLM 3, and OLMo 2: separate projections, a gated MLP, RMS norms.

SmolLM 3 turns no positions in some of its blocks. OLMo 2 has its norms behind attention and MLP instead of
before them, and norms queries and keys over all heads together.
"""

from typing import Any

from compress.export.onnx.architecture import Block, Decoder, Norm
from compress.export.onnx.families.parts import attention_of, decoder, gated_mlp, rms, rotary, window


def read_llama(model: Any) -> Decoder:
    """Norms before attention and MLP."""
    config, body = model.config, model.model
    angles = rotary(body.rotary_emb)
    blocks = []
    for index, layer in enumerate(body.layers):
        name = f"model.layers.{index}"
        attention = layer.self_attn
        blocks.append(
            Block(
                attention_norm=rms(f"{name}.input_layernorm", layer.input_layernorm),
                attention=attention_of(
                    f"{name}.self_attn",
                    attention,
                    angles if getattr(attention, "use_rope", True) else None,
                    query_norm=_norm_of(f"{name}.self_attn", attention, "q_norm"),
                    key_norm=_norm_of(f"{name}.self_attn", attention, "k_norm"),
                    window=window(config, index),
                ),
                mlp_norm=rms(f"{name}.post_attention_layernorm", layer.post_attention_layernorm),
                mlp=gated_mlp(f"{name}.mlp", layer.mlp, config),
            )
        )
    return decoder(model, body.embed_tokens, blocks, rms("model.norm", body.norm))


def read_olmo2(model: Any) -> Decoder:
    """Norms behind attention and MLP only."""
    config, body = model.config, model.model
    angles = rotary(body.rotary_emb)
    blocks = []
    for index, layer in enumerate(body.layers):
        name = f"model.layers.{index}"
        attention = layer.self_attn
        blocks.append(
            Block(
                attention_norm=None,
                attention=attention_of(
                    f"{name}.self_attn",
                    attention,
                    angles,
                    query_norm=rms(f"{name}.self_attn.q_norm", attention.q_norm),
                    key_norm=rms(f"{name}.self_attn.k_norm", attention.k_norm),
                ),
                attention_output_norm=rms(f"{name}.post_attention_layernorm", layer.post_attention_layernorm),
                mlp_norm=None,
                mlp=gated_mlp(f"{name}.mlp", layer.mlp, config),
                mlp_output_norm=rms(f"{name}.post_feedforward_layernorm", layer.post_feedforward_layernorm),
            )
        )
    return decoder(model, body.embed_tokens, blocks, rms("model.norm", body.norm))


def _norm_of(name: str, attention: Any, attribute: str) -> Norm | None:
    return (
        rms(f"{name}.{attribute}", getattr(attention, attribute)) if hasattr(attention, attribute) else None
    )
