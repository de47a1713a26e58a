"""torch-pruning alone: a share of every MLP's neurons, by its group importances.

Groups are taken from its graph one by one: its `BasePruner` lists every group at once and does not come back
from the rotary positions of grouped-query attention, whose halves of a head it takes for joined features.
"""

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
graph = tp.DependencyGraph().build_dependency(
    model,
    example_inputs={"input_ids": windows[:1, :16], "use_cache": False},
    output_transform=lambda output: output.logits,
)
for layer in model.model.layers:
    gate = layer.mlp.gate_proj
    whole = graph.get_pruning_group(gate, tp.prune_linear_out_channels, idxs=list(range(gate.out_features)))
    lowest = importance(whole).argsort()[: round(job.settings["neurons"] * gate.out_features)]
    graph.get_pruning_group(gate, tp.prune_linear_out_channels, idxs=lowest.tolist()).prune()
model.zero_grad()
model.config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
model.save_pretrained(job.artifact)
AutoTokenizer.from_pretrained(job.base).save_pretrained(job.artifact)
job.finish(linear_bytes=0)
