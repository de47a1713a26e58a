"""llama.cpp's importance matrix, as its tool `llama-imatrix` makes one.

For each column of each matrix of a decoder's blocks the mean square of what it is multiplied with. In a file
of its own, since without it a worker does not load torch.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def add_squares(total: torch.Tensor, layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
    """Of inputs (..., in), in the mean over tokens, to a total (in,)."""
    total += inputs[0].flatten(0, -2).square().mean(0)


@torch.inference_mode()
def importance(base: Path, tokens: Any) -> dict[str, torch.Tensor]:
    """Of every matrix of the blocks by llama.cpp's name, over token windows (n, length): float32 (in,)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    windows = torch.from_numpy(tokens)
    found: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        for place, name in NAMES.items():
            linear = layer.get_submodule(place)
            total = found[f"blk.{number}.{name}.weight"] = torch.zeros(linear.in_features)
            linear.register_forward_pre_hook(partial(add_squares, total))
    for row in windows:
        model.model(input_ids=row[None], use_cache=False)
    return {name: total / len(windows) for name, total in found.items()}
