"""bitsandbytes through transformers: NF4 in blocks of 64, no calibration text."""

from common import Job, linear_bytes

job = Job()
import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

job.start()
config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **job.settings
)
model = AutoModelForCausalLM.from_pretrained(
    job.base, dtype=torch.float32, quantization_config=config, device_map="cpu"
)
model.save_pretrained(job.artifact)
job.finish(linear_bytes(job.artifact))
weights = {
    f"{name}.weight": bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    for name, module in model.named_modules()
    if isinstance(module, bnb.nn.Linear4bit)
}
job.save_weights(weights)
