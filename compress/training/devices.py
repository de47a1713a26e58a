"""Devices and processes, through `accelerate`: one process, DDP, or FSDP2, by how the command was started.

`torchrun --nproc-per-node N -m compress run ...` and `accelerate launch -m compress run ...` set variables
that `accelerate` reads. A step's windows are dealt out to the processes, each computes its part of the mean
over all of them, and the gradients are summed in float32: the same gradient as one process with all windows,
up to the order of sums. Precision is not accelerate's business here: its wrapper would stay on the model.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.stacks import decoder_blocks


class Devices:
    """What the loop needs to know of the processes it shares its work with."""

    def __init__(
        self, device: torch.device, trackers: tuple[str, ...] = (), logs: Path | None = None
    ) -> None:
        """Join the other processes.

        Args:
            device: where to compute.
            trackers: what curves are logged with.
            logs: where to; needed with trackers.
        """
        from accelerate import Accelerator

        self.accelerator = Accelerator(
            mixed_precision="no", cpu=device.type == "cpu", log_with=list(trackers) or None, project_dir=logs
        )
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        kind = self.accelerator.distributed_type.value
        # accelerate leaves CPUs to DDP whatever it is told; torch shards on them as well
        self.own_shards = kind == "MULTI_CPU" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        self.sharded = self.own_shards or kind == "FSDP"

    def wrap(self, model: nn.Module) -> Any:
        """The model as its gradient is taken: itself, or inside what averages or shards."""
        if not self.sharded:
            return self.accelerator.prepare(model)
        for parameter in model.parameters():  # what is stored transposed lies so in memory; shards are rows
            parameter.data = parameter.data.contiguous()
        if self.own_shards:
            return _shard(model, self.count)
        # accelerate shards a model only beside an optimiser; ours are built from the shards afterwards
        return self.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))[0]

    def backward(self, loss: Tensor, extra: nn.Module, last: bool) -> None:
        """Add a gradient; processes meet at the last micro-batch of a step."""
        loss.backward()
        if last and self.count > 1:
            for parameter in extra.parameters():  # they lie outside what averages
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum")

    def summed(self, model: nn.Module) -> None:
        """Make the sum over processes of the mean that DDP and FSDP2 leave in the gradients."""
        if self.count > 1:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.count)

    def clip(self, model: nn.Module, extra: nn.Module, limit: float) -> None:
        """Shorten the gradient to a norm of at most `limit`."""
        own, beside = list(model.parameters()), list(extra.parameters())
        # shards and whole tensors have no norm together
        for parameters in [own, beside] if self.sharded else [own + beside]:
            torch.nn.utils.clip_grad_norm_(parameters, limit)

    def grad_sync(self, wrapped: Any, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: its gradients meet those of other processes only if it is the last."""
        if self.own_shards:
            wrapped.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(wrapped)

    def rest(self, model: nn.Module) -> None:
        """After a forward pass that no backward one follows: let go of what was gathered for it."""
        if self.sharded:
            for module in model.modules():
                reshard: Any = getattr(module, "reshard", None)
                if reshard is not None:
                    reshard()

    def sum(self, value: Tensor) -> float:
        """Over the processes."""
        return float(self.accelerator.reduce(value, reduction="sum"))

    def log(self, step: int, **values: float | None) -> None:
        """A point of the trackers' curves."""
        if self.accelerator.trackers:
            self.accelerator.log({k: v for k, v in values.items() if v is not None}, step=step)

    def agreed(self, flag: bool) -> bool:
        """The main process's answer: clocks differ, and a checkpoint of shards needs all processes."""
        if not self.sharded:
            return flag and self.main
        answer = torch.tensor(float(flag and self.main), device=self.accelerator.device)
        return bool(self.accelerator.reduce(answer, reduction="sum") > 0)


def _shard(model: nn.Module, count: int) -> Any:
    """FSDP2 over all processes, a block at a time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (count,))
    for block in decoder_blocks(model)[1]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)
