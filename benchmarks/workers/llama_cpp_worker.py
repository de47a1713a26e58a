"""llama.cpp's own quantizer through llama-cpp-python: GGUF to GGUF.

`BASE` is the folder beside which the GGUF that it was read from lies, as `base.gguf`. With the setting
`imatrix` the quantizer gets an importance matrix, as its tool `llama-imatrix` makes one: for each column of
each matrix of the blocks the mean square of what it is multiplied with, over the calibration windows. It is
computed in torch, here and now, so that its time and memory count.
"""

import ctypes
from functools import partial

from common import Job

job = Job()
import llama_cpp  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def add_squares(total: torch.Tensor, layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
    """Of inputs (..., in), in the mean over tokens, to a total (in,)."""
    total += inputs[0].flatten(0, -2).square().mean(0)


@torch.inference_mode()
def importance() -> dict[str, torch.Tensor]:
    """Of every matrix of the blocks by llama.cpp's name: float32 (in,)."""
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32).eval()
    windows = torch.from_numpy(job.windows())
    found: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        for place, name in NAMES.items():
            linear = layer.get_submodule(place)
            total = found[f"blk.{number}.{name}.weight"] = torch.zeros(linear.in_features)
            linear.register_forward_pre_hook(partial(add_squares, total))
    for row in windows:
        model.model(input_ids=row[None], use_cache=False)
    return {name: total / len(windows) for name, total in found.items()}


job.start()
target = job.artifact / "model.gguf"
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job.settings['type']}")
parameters.allow_requantize = True
parameters.nthread = 2
if job.settings.get("imatrix"):
    kept = {name.encode(): total.contiguous() for name, total in importance().items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()  # the last, all zero, ends the list
    for entry, (name, total) in zip(entries, kept.items(), strict=False):
        entry.name, entry.size = name, total.numel()
        entry.data = ctypes.cast(total.data_ptr(), ctypes.POINTER(ctypes.c_float))
    parameters.imatrix = entries
source = job.base.parent / "base.gguf"
failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
assert failed == 0, f"llama_model_quantize: {failed}"
job.finish(0)  # the scorer, which reads GGUF, counts the linear layers' bytes
