"""llm-compressor: SparseGPT and Wanda, layer after layer (`sequential`), all linear layers but the head."""

from common import Job

job = Job()
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

job.start()
model = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32)
windows = job.windows()
rows = {"input_ids": windows.tolist(), "attention_mask": [[1] * windows.shape[1]] * len(windows)}
modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[job.settings["method"]]
oneshot(
    model=model,
    dataset=Dataset.from_dict(rows),
    recipe=modifier(
        sparsity=job.settings["sparsity"],
        mask_structure=job.settings.get("pattern", "0:0"),
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    ),
    num_calibration_samples=len(windows),
    max_seq_length=windows.shape[1],
    shuffle_calibration_samples=False,
    pipeline="sequential",
)
model.save_pretrained(job.artifact, save_compressed=False)
AutoTokenizer.from_pretrained(job.base).save_pretrained(job.artifact)
job.finish(linear_bytes=0)
