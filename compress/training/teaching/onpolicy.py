"""On-policy batches: windows whose ends the student writes itself, and the teacher then judges.

Generalised knowledge distillation (GKD: Agarwal et al. 2023, arXiv 2306.13649): with probability lambda a
step trains on y ~ p_student(. | prompt) instead of the text, so that the student learns where its own
mistakes lead it. No gradient passes through the sampling; only sampled positions count. Which steps are
on-policy is a function of (seed, step), and what is drawn for a window one of (seed, step, window), whichever
windows are computed together, and by whatever process. Cost: a forward pass of the student
per sampled token, with a key-value cache.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.models.running import Precision, autocast, evaluating


def on_policy(share: float, seed: int, step: int) -> bool:
    """Whether a step trains on the student's own text."""
    return share > 0 and np.random.default_rng([seed, step, 0x6B64]).random() < share


def draws(seed: int, step: int, windows: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Uniform numbers for `count` tokens of each window, (windows, count)."""
    return np.stack([np.random.default_rng([seed, step, int(w), 0x6B64]).random(count) for w in windows])


@torch.no_grad()
def continued(
    model: Any, rows: Tensor, prompt: int, precision: Precision, uniform: NDArray[np.float64]
) -> Tensor:
    """Rows (n, length) whose tokens from `prompt` on are sampled from the model at temperature 1.

    Each is the first whose cumulative probability exceeds its number of `uniform`, (n, length - prompt).
    """
    tokens = feed = rows[:, :prompt]
    shares = torch.from_numpy(uniform).to(torch.float64 if rows.device.type != "mps" else torch.float32)
    shares = shares.to(rows.device)
    cache = None
    with evaluating(model):
        for place in range(rows.shape[1] - prompt):
            with autocast(rows.device, precision):
                outputs = model(input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = outputs.past_key_values
            feed = drawn(outputs.logits[:, -1], shares[:, place : place + 1])
            tokens = torch.cat([tokens, feed], dim=1)
    return tokens


def drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """A token of each row: logits (n, v), uniform (n, 1) -> (n, 1).

    >>> drawn(torch.tensor([[0.0, -99.0, 0.0]]), torch.tensor([[0.51]])).tolist()
    [[2]]
    """
    reached = torch.softmax(logits.to(uniform.dtype), dim=-1).cumsum(-1)
    found = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
    return found.clamp_(max=logits.shape[1] - 1)
