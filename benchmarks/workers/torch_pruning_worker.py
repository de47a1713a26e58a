"""torch-pruning alone: a share of every MLP's neurons, and of the model's width, by its group importances."""

from common import Job

job = Job()
import torch  # noqa: E402
import torch_pruning as tp  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

job.start()
model = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32).eval()
windows = torch.from_numpy(job.windows())
if job.settings["importance"] == "taylor":
    for row in windows:
        (model(input_ids=row[None], labels=row[None], use_cache=False).loss / len(windows)).backward()
    importance = tp.importance.GroupTaylorImportance(group_reduction="mean")
else:
    importance = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
ratios = {layer.mlp.gate_proj: job.settings["neurons"] for layer in model.model.layers}
if "width" in job.settings:
    ratios[model.model.embed_tokens] = job.settings["width"]
pruner = tp.pruner.BasePruner(
    model,
    example_inputs={"input_ids": windows[:1, :16]},
    importance=importance,
    pruning_ratio=0.0,
    pruning_ratio_dict=ratios,
    ignored_layers=[] if "width" in job.settings else [model.lm_head],
    root_module_types=[torch.nn.Linear, torch.nn.Embedding],
    round_to=job.settings.get("multiple"),
    output_transform=lambda output: output.logits,
)
for group in pruner.step(interactive=True):
    group.prune()
model.zero_grad()
model.config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
model.config.hidden_size = model.model.embed_tokens.weight.shape[1]
model.save_pretrained(job.artifact)
AutoTokenizer.from_pretrained(job.base).save_pretrained(job.artifact)
job.finish(linear_bytes=0)
