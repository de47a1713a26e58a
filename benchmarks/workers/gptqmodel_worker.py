"""GPTQModel: GPTQ, symmetric, as its README recommends (activation-group-aware order is its default)."""

import os

os.cpu_count = lambda: 8  # its loader asks for more workers than it allows itself on two cores

from common import Job, linear_bytes  # noqa: E402

job = Job()
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from packed_checkpoint import dequantized  # noqa: E402

job.start()
config = QuantizeConfig(bits=job.settings["bits"], group_size=job.settings["group"])
model = GPTQModel.load(str(job.base), config)
rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in job.windows()]
model.quantize(rows, batch_size=job.settings.get("batch", 1))
model.save(str(job.artifact))
job.finish(linear_bytes(job.artifact))
job.save_weights(dequantized(job.artifact, bits=job.settings["bits"]))
