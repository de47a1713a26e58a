"""Magnitudes of the inputs of linear layers, from one run of the whole model over the calibration text.

What scales of input channels are chosen by. Second moments are the business of calibration/moments.py.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.host.progress import track


@dataclass
class InputStatistics:
    """Of one layer's inputs x (positions, in), float32.

    Attributes:
        count: positions seen.
        total: sum of |x_j|, (in,).
        squares: sum of x_j^2, (in,).
        largest: max |x_j|, (in,).
        sample: rows of x, some of every window.
    """

    count: int
    total: Tensor
    squares: Tensor
    largest: Tensor
    sample: list[Tensor]

    @property
    def mean(self) -> Tensor:
        """E|x_j|, (in,)."""
        return self.total / max(self.count, 1)

    @property
    def rms(self) -> Tensor:
        """sqrt(E x_j^2), (in,)."""
        return (self.squares / max(self.count, 1)).sqrt()

    def add(self, x: Tensor, rows: int) -> None:
        """Take in x (positions, in); keep about `rows` evenly spaced ones."""
        size = x.abs()
        self.count += len(x)
        self.total = self.total + size.sum(0)
        self.squares = self.squares + size.square().sum(0)
        self.largest = torch.maximum(self.largest, size.amax(0))
        if rows:
            self.sample.append(x[:: max(1, len(x) // rows)][:rows].clone())


@torch.no_grad()
def input_statistics(
    model: Any, windows: Tensor, names: Sequence[str], *, samples: int = 512, batch: int = 4
) -> dict[str, InputStatistics]:
    """Run `model`, in eval mode, on token ids (n, length) and watch the inputs of the modules `names`.

    `samples` rows of each are kept, spread over all windows; 0 keeps none. Memory: samples * in per layer.
    """
    batches = windows.split(batch)
    rows = -(-samples // len(batches))
    found: dict[str, InputStatistics] = {}

    def watching(name: str) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].detach().float().flatten(0, -2)
            if name not in found:
                none = x.new_zeros(x.shape[1])
                found[name] = InputStatistics(0, none, none, none, [])
            found[name].add(x, rows)

        return hook

    device = model.get_input_embeddings().weight.device
    backbone = getattr(model, model.base_model_prefix, model)
    with ExitStack() as stack, track(len(batches), "watching inputs", "batches") as progress:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(watching(name))
            stack.callback(handle.remove)
        for tokens in batches:
            backbone(input_ids=tokens.to(device), **_no_cache(model))
            progress.advance()
    return found


def _no_cache(model: Any) -> dict[str, bool]:
    """Encoders know of no cache."""
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}
