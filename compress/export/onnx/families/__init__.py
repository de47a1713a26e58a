"""The families of decoders that can be described (export/onnx/architecture.py), and their readers.

Limits: rotary embeddings whose angles are one table (default, linear, llama3, yarn); those that change with
the length of the text (dynamic, longrope) are refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress.errors import UserError
from compress.export.onnx.architecture import Decoder
from compress.export.onnx.families.gemma import read_gemma
from compress.export.onnx.families.gpt import read_gpt2, read_gpt_neox
from compress.export.onnx.families.llama import read_llama, read_olmo2
from compress.export.onnx.families.parts import ACTIVATIONS, activation_name
from compress.export.onnx.families.phi import read_phi, read_phi3
from compress.export.onnx.rotary import HEAD_STEP, require_turnable
from compress.models.attention import rotary_settings

_READERS: dict[str, Callable[[Any], Decoder]] = {
    "gemma": read_gemma,
    "gemma2": read_gemma,
    "gemma3_text": read_gemma,
    "gpt2": read_gpt2,
    "gpt_neox": read_gpt_neox,
    "llama": read_llama,
    "mistral": read_llama,
    "olmo2": read_olmo2,
    "phi": read_phi,
    "phi3": read_phi3,
    "qwen2": read_llama,
    "qwen3": read_llama,
    "smollm3": read_llama,
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
    activation = activation_name(config)
    if activation not in ACTIVATIONS:
        raise UserError(
            f"export_onnx: activation '{activation}' is not supported; supported: "
            + ", ".join(sorted(ACTIVATIONS))
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(
            "export_onnx: use_bidirectional_attention is not supported, a decoder looks back only"
        )
    if config.model_type == "gpt2" and (config.add_cross_attention or config.scale_attn_by_inverse_layer_idx):
        raise UserError("export_onnx: GPT-2 with cross attention or scaling by layer is not supported")
    for rotary in rotary_settings(config):
        if rotary.get("rope_type", "default") not in _FIXED_ROTARY:
            raise UserError(
                f"export_onnx: rope_type '{rotary['rope_type']}' changes with the text's length and is not "
                f"supported; supported: {', '.join(_FIXED_ROTARY)}"
            )
        if rotary:
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            require_turnable(width, int(width * rotary.get("partial_rotary_factor", 1.0)) // 2)
            if width % HEAD_STEP:
                raise UserError(
                    f"export_onnx: heads {width} wide whose positions turn are not supported, ONNX Runtime "
                    f"takes multiples of {HEAD_STEP}; leave export_onnx out to have it in torch only"
                )


def describe(model: nn.Module) -> Decoder:
    """Read a decoder off its modules. Raises UserError as `require_supported` does."""
    require_supported(model.config)
    with torch.no_grad():
        return _READERS[str(model.config.model_type)](model)  # type: ignore[union-attr]
