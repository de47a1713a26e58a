"""Gemma, Gemma 2 and Gemma 3 (text): scaled embeddings, and norms whose gain is 1 + weight.

From Gemma 2 on a norm stands before and behind attention and MLP, and blocks see a window or everything in
turn; Gemma 2 caps scores and logits; Gemma 3 norms each head and has one table of angles per kind of block.
"""

from typing import Any

from compress.export.onnx.architecture import Block, Decoder, Norm
from compress.export.onnx.families.parts import attention_of, decoder, gated_mlp, rotary, window


def read_gemma(model: Any) -> Decoder:
    """All three: what a generation lacks is absent from its modules."""
    config, body = model.config, model.model
    kinds = getattr(config, "layer_types", None) or [""] * len(body.layers)
    if config.model_type == "gemma3_text":
        angles = {kind: rotary(body.rotary_emb, kind) for kind in set(kinds)}
    else:
        angles = dict.fromkeys(kinds, rotary(body.rotary_emb))
    blocks = []
    for index, layer in enumerate(body.layers):
        name = f"model.layers.{index}"
        attention = layer.self_attn
        pre_mlp, post_mlp = "pre_feedforward_layernorm", "post_feedforward_layernorm"
        both = hasattr(layer, pre_mlp)  # from the second generation on
        behind = _norm(name, layer, "post_attention_layernorm")
        blocks.append(
            Block(
                attention_norm=_norm(name, layer, "input_layernorm"),
                attention=attention_of(
                    f"{name}.self_attn",
                    attention,
                    angles[kinds[index]],
                    query_norm=_norm(f"{name}.self_attn", attention, "q_norm"),
                    key_norm=_norm(f"{name}.self_attn", attention, "k_norm"),
                    window=window(config, index),
                    # Gemma 3 has the field, too, but nothing reads it there
                    softcap=config.attn_logit_softcapping if config.model_type == "gemma2" else None,
                ),
                attention_output_norm=behind if both else None,
                mlp_norm=_norm(name, layer, pre_mlp) if both else behind,
                mlp=gated_mlp(f"{name}.mlp", layer.mlp, config),
                mlp_output_norm=_norm(name, layer, post_mlp),
            )
        )
    norm = _norm("model", body, "norm")
    assert norm is not None
    softcap = getattr(config, "final_logit_softcapping", None)
    return decoder(model, body.embed_tokens, blocks, norm, softcap=softcap)


def _norm(name: str, parent: Any, attribute: str) -> Norm | None:
    """An RMS norm whose weight is what its gain has more than 1; None where the parent has none."""
    module = getattr(parent, attribute, None)
    if module is None:
        return None
    return Norm(
        "rms", f"{name}.{attribute}", 1.0 + module.weight.detach().float().cpu(), None, float(module.eps)
    )
