"""HQQ: half-quadratic quantization, no calibration text."""

from common import Job

job = Job()
import torch  # noqa: E402
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # noqa: E402
from hqq.models.hf.base import AutoHQQHFModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

job.start()
model = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32)
config = BaseQuantizeConfig(nbits=job.settings["bits"], group_size=job.settings["group"])
AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
AutoHQQHFModel.save_quantized(model, str(job.artifact))
layers = {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}
held = 0
for module in layers.values():
    tensors = [module.W_q, *(x for x in module.meta.values() if isinstance(x, torch.Tensor))]
    held += sum(x.numel() * x.element_size() for x in tensors)
job.finish(held)
weights = {f"{name}.weight": module.dequantize() for name, module in layers.items()}
assert len(weights) == 7 * model.config.num_hidden_layers, "layers are missing"
job.save_weights(weights)
