"""GPTQModel: GPTQ, symmetric, as its README recommends (activation-group-aware order is its default)."""

import os

os.cpu_count = lambda: 8  # its loader asks for more workers than it allows itself on two cores

from common import Job, linear_bytes  # noqa: E402

job = Job()
import torch  # noqa: E402
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from packed_checkpoint import dequantized  # noqa: E402

job.start()
config = QuantizeConfig(bits=job.settings["bits"], group_size=job.settings["group"])
# its own choice on every CPU is bfloat16, which a processor without it multiplies hundreds of times slower
native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
model = GPTQModel.load(str(job.base), config, **({} if native else {"dtype": torch.float32}))
rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in job.windows()]
model.quantize(rows, batch_size=job.settings.get("batch", 1))
model.save(str(job.artifact))
job.finish(linear_bytes(job.artifact))
job.save_weights(dequantized(job.artifact, bits=job.settings["bits"]))
