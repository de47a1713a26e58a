"""On-policy batches: windows whose ends the student writes itself, and the teacher then judges.

Generalised knowledge distillation (GKD: Agarwal et al. 2023, arXiv 2306.13649): with probability lambda a
step trains on y ~ p_student(. | prompt) instead of the text, so that the student learns where its own
mistakes lead it. No gradient passes through the sampling; only sampled positions count. Which steps are
on-policy is a function of (seed, step). Cost: a forward pass of the student per sampled token, with a
key-value cache.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.models.running import Precision, autocast, evaluating


def on_policy(share: float, seed: int, step: int) -> bool:
    """Whether a step trains on the student's own text."""
    return share > 0 and np.random.default_rng([seed, step, 0x6B64]).random() < share


@torch.no_grad()
def continued(model: Any, rows: Tensor, prompt: int, precision: Precision) -> Tensor:
    """Rows (n, length) whose tokens from `prompt` on are sampled from the model at temperature 1."""
    tokens = feed = rows[:, :prompt]
    cache = None
    with evaluating(model):
        for _ in range(rows.shape[1] - prompt):
            with autocast(rows.device, precision):
                outputs = model(input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = outputs.past_key_values
            feed = torch.multinomial(torch.softmax(outputs.logits[:, -1].float(), dim=-1), 1)  # (n, 1)
            tokens = torch.cat([tokens, feed], dim=1)
    return tokens
