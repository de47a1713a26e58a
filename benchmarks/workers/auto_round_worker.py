"""AutoRound: signed gradient descent on rounding and ranges, block by block."""

from common import Job, linear_bytes

job = Job()
import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from packed_checkpoint import dequantized  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

job.start()
model = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(job.base)
windows = torch.from_numpy(job.windows())
settings = dict(job.settings)
rounder = AutoRound(
    model,
    tokenizer,
    bits=settings.pop("bits"),
    group_size=settings.pop("group"),
    sym=True,
    dataset=[row[None] for row in windows],
    nsamples=len(windows),
    seqlen=windows.shape[1],
    device_map="cpu",
    **settings,
)
rounder.quantize_and_save(str(job.artifact), format="auto_gptq")
job.finish(linear_bytes(job.artifact))
job.save_weights(dequantized(job.artifact, bits=job.settings["bits"]))
