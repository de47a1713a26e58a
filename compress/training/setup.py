"""What the steps of a training work with, made before the first: devices, batches, optimisers, progress."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.context import TrainingContext
from compress.errors import UserError
from compress.models.running import backward_passes, gradient_checkpointing, heldout_nll
from compress.training import checkpoint, depths, rates, sharding
from compress.training.averaging import Average
from compress.training.batches import Batches, Material
from compress.training.devices import Devices
from compress.training.gradients import Gradients
from compress.training.identity import digest_of
from compress.training.masking import Masks
from compress.training.objectives.base import Objective
from compress.training.plan import Optimization
from compress.training.products import summed_in_float32
from compress.training.scheduled import Scheduled
from compress.training.stopping import Best, Keeper, Progress
from compress.training.trackers import tracking


class Run:
    """One training: its parts by name, and how far it is (`progress`), which is where a killed one was.

    Attributes:
        model: what is trained, on `device`; `wrapped` is the same as its gradient is taken.
        extra: learns beside it.
        heldout: int64 (windows, length), on `device`.
        steps: of the whole run, each of `step_tokens` tokens.
    """

    def __init__(
        self,
        model: Any,
        plan: Optimization,
        objective: Objective,
        context: TrainingContext,
        devices: Devices,
        batches: Material,
        masks: Mapping[str, Tensor],
    ) -> None:
        self.model, self.plan, self.objective, self.devices, self.batches = (
            model,
            plan,
            objective,
            devices,
            batches,
        )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(f"freeze: {list(plan.freeze)} leaves nothing to train; name fewer modules")
        self.device, self.precision = context.device, plan.precision_on(context.precision)
        self.steps, self.step_tokens = plan.steps(batches), batches.step_tokens
        self.heldout = torch.from_numpy(context.data.heldout.tokens.astype(np.int64)).to(self.device)
        self.masks = Masks(model, masks)
        self.masks.weights()
        digests = [checkpoint.digest(model), digest_of(self.masks.kept().items()), objective.identity]
        found = batches.identity([plan.deciding(self.precision), *digests])
        factors = rates.factors(model, plan.slower)
        levels = depths.levels(model) if plan.unfreeze or plan.layer_decay != 1 else {}
        for name, decay in depths.decays(levels, plan.layer_decay).items():
            factors[name] = decay * factors.get(name, 1.0)
        self.wrapped = devices.wrap(model)  # sharding puts others in the place of the model's parameters
        self.masks.refresh()
        self.extra = objective.extra.to(self.device)
        self.optimisers = Scheduled(model, self.extra, plan, self.steps, factors, self.precision)
        self.gradients = Gradients(model, plan, levels, self.steps)
        self.average = Average(model, plan.average, plan.average_share, self.steps)
        self.keeper = Keeper(model, plan.patience)
        self._path = context.workdir / "training.safetensors"
        self._trained = nn.ModuleDict({"model": model, "extra": self.extra})
        self._others = {f"average.{name}": value for name, value in self.average.tensors.items()}
        self._others |= {f"best.{name}": value for name, value in self.keeper.tensors.items()}
        if objective.masks is not None:
            self._others |= {f"mask.{name}": value for name, value in self.masks.tensors.items()}
        self.progress = self._restored(found) or self._beginning(found)

    def step_seed(self, step: int) -> int:
        """Of dropout and sampling, if there are any; processes draw numbers of their own."""
        return ((self.batches.seed * 1_000_003 + step) * 1_009 + self.devices.rank) % 2**63

    def heldout_loss(self) -> float:
        """Of the model as it stands: nats per token, or what the objective says."""
        if self.objective.heldout is not None:
            loss = self.objective.heldout(self.model, self.precision)
        else:
            loss = heldout_nll(self.model, self.heldout, self.precision)
        self.devices.rest(self.model)
        return loss

    def save(self) -> None:
        """Write a checkpoint in the place of the last."""
        progress, main = asdict(self.progress), self.devices.main
        checkpoint.save(self._path, self._trained, self.optimisers.parts, progress, self._others, main)

    def _restored(self, found: str) -> Progress | None:
        values = checkpoint.restore(self._path, self._trained, self.optimisers.parts, found, self._others)
        self.masks.refresh()
        self.masks.weights()  # of what does not learn, too, which no checkpoint holds
        return None if values is None else Progress.read(values)

    def _beginning(self, found: str) -> Progress:
        before = self.heldout_loss()
        return Progress(found, before, Best(float("inf") if self.objective.judge_from else before))


def material_of(plan: Optimization, objective: Objective, context: TrainingContext) -> Material:
    """What is learnt from: the objective's own, or windows of the training text.

    Raises:
        UserError: it does not fill one batch.
    """
    if objective.material is not None:
        return objective.material.check()
    text, window = context.data, plan.window or context.data.window
    return Batches(text.train, window, plan.windows, context.seed, objective.moving, text.begin).check()


@contextmanager
def ready(
    model: Any,
    plan: Optimization,
    objective: Objective,
    context: TrainingContext,
    masks: Mapping[str, Tensor],
) -> Iterator[Run]:
    """A run, and around it all that lasts as long as it trains; then `model` holds what it ended with, on the
    CPU, in eval mode, and `masks` those of the result.
    """
    batches = material_of(plan, objective, context)
    logs = context.logs or context.workdir / "logs"
    devices = Devices(context.device, plan.trackers, logs)
    # sharding changes a model for good: it gets a copy, and the result is copied back
    own = (copy.deepcopy(model) if devices.sharded else model).to(context.device)
    settings = plan.deciding(plan.precision_on(context.precision))
    with ExitStack() as during:
        during.enter_context(backward_passes(own))
        during.enter_context(summed_in_float32(own, plan.precision_on(context.precision)))
        during.enter_context(_random_numbers(context.device))
        during.enter_context(rates.frozen(own, plan.freeze, depths.below(own, plan.last_blocks)))
        during.enter_context(depths.dropping(own, plan.dropout))
        during.enter_context(gradient_checkpointing(own, plan.gradient_checkpointing))
        during.enter_context(objective.watch(own))
        during.enter_context(tracking(devices.accelerator, logs, plan.trackers, settings))
        run = Run(own, plan, objective, context, devices, batches, masks)
        yield run
        if devices.sharded:
            sharding.gather(own, model)
        model.__dict__.pop("_is_accelerate_prepared", None)  # a later loop must prepare it anew
        model.cpu().eval()
        if objective.masks is not None:
            for name, kept in run.masks.kept().items():
                masks[name].copy_(kept)


def _random_numbers(device: torch.device) -> Any:
    """Leaves torch's generators as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
