"""The one optimisation loop: base training, healing and distillation differ in their objective only.

A step takes its windows (`batches`), computes the loss on micro-batches, each divided by the windows of the
whole step, sums the gradient over them and over processes in float32 (`products`, `devices`), clips it to a
norm, updates, and puts pruned weights back to zero (`masking`). At held-out points it is decided which
weights to keep (`stopping`, `averaging`). Parameters and states are float32; the forward pass runs under
autocast in `precision`.

Same seed, same thread count: same weights, also across kills. The order of data and the dropout are pure
functions of (seed, step), and the clock decides only when a checkpoint is written.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compress.context import TrainingContext
from compress.errors import UserError
from compress.host.progress import SILENT, Tracker, track
from compress.models.running import autocast
from compress.training.notes import notes
from compress.training.objectives.base import Moment, Objective
from compress.training.plan import Optimization
from compress.training.setup import Run, ready


def optimise(
    model: Any,
    plan: Optimization,
    objective: Objective,
    context: TrainingContext,
    *,
    masks: Mapping[str, Tensor] | None = None,
    what: str = "training",
) -> dict[str, Any]:
    """Train `model` in place; it comes back on the CPU, in eval mode.

    Args:
        model: a language model in float32.
        plan: the settings.
        objective: what to minimise, and what belongs to it.
        context: text, seed, device, and where the checkpoint lives.
        masks: module name -> bool (out, in); False stays exactly zero. Written to where the objective has a
            schedule of masks: in the end they are those of the result.
        what: the label of the progress bar.

    Returns:
        Facts for the record, `loss_curve` [[step, tokens, loss, heldout or None], ...] among them.

    Raises:
        UserError: the text does not fill one batch, or wildcards of the plan fit nothing.
    """
    plan.check(model)
    with ready(model, plan, objective, context, masks or {}) as run:
        _train(run, what)
    return notes(run, model)


def _train(run: Run, what: str) -> None:
    """All steps that are left, each in the order it happens; the model then holds the weights to keep."""
    plan, objective, devices, progress = run.plan, run.objective, run.devices, run.progress
    model, masks, average, keeper = run.model, run.masks, run.average, run.keeper
    saved = time.monotonic()
    model.train()
    with _bar(run, what) as bar:
        while progress.step < run.steps and not keeper.done(progress.best):
            began, step = time.monotonic(), progress.step

            # masks that change now
            if objective.masks is not None:
                masks.update(objective.masks(masks.layers, masks.kept, step, run.steps))

            # this process's windows of the step: forward, loss, backward, a micro-batch at a time
            torch.manual_seed(run.step_seed(step))
            own = torch.zeros((), device=run.device)  # this process's part of the mean loss
            for part in run.batches.micro_batches(step, plan.accumulate, devices.rank, devices.count):
                rows = torch.from_numpy(part.rows).to(run.device)  # (windows, window + 1)
                moment = Moment(step, run.steps, part.numbers)
                if objective.rewrite is not None:
                    rows, start = objective.rewrite(model, rows, moment)
                    moment = moment._replace(start=start)
                more = {name: torch.from_numpy(value).to(run.device) for name, value in part.more.items()}
                asked = objective.ask(rows, more, moment)  # (windows, window) each
                with devices.grad_sync(run.wrapped, part.last):
                    with autocast(run.device, run.precision):
                        outputs = run.wrapped(**asked.inputs)
                    loss = objective.loss(outputs, asked.inputs, asked.targets, moment) * part.share
                    devices.backward(loss, run.extra, part.last)
                own += loss.detach()

            # update; pruned weights have no share in the norm, and stay zero
            devices.summed(model)
            masks.gradients()
            run.gradients.prepare(step, masks.by_parameter())
            devices.clip(model, run.extra, plan.clip)
            run.optimisers.step(step)
            masks.weights()
            average.update(step)

            # held-out loss where it is due: which weights to keep, and whether to go on
            heldout = run.heldout_loss() if plan.scores_after(step, run.steps) else None
            value, tokens = devices.sum(own), (step + 1) * run.step_tokens
            _check_finite(what, step + 1, value, heldout)
            progress.record(value, tokens, heldout, run.steps)
            if heldout is not None and progress.step >= objective.judge_from:
                progress.best.stale += 1  # unless something better is kept now
                keeper.consider(progress, heldout)
                if average.coefficient(step) is not None:
                    with average.swapped():
                        masks.weights()
                        of_average = run.heldout_loss()
                        progress.average_curve.append([progress.step, of_average])
                        keeper.consider(progress, of_average, averaged=True)

            progress.seconds += time.monotonic() - began
            pace = f"{tokens / progress.seconds:,.0f}"
            bar.advance(run.step_tokens, loss=value, **{"tokens/s": pace})
            devices.log(progress.step, loss=value, heldout=heldout, tokens=tokens)

            # a checkpoint where the last is old
            late = time.monotonic() - saved >= plan.checkpoint_seconds
            if progress.step < run.steps and devices.agreed(late):
                run.save()
                saved = time.monotonic()

    if plan.patience is not None:
        keeper.restore()
    elif progress.best.averaged:
        average.swap()
    masks.weights()


def _check_finite(what: str, step: int, loss: float, heldout: float | None) -> None:
    if not math.isfinite(loss) or (heldout is not None and not math.isfinite(heldout)):
        raise UserError(
            f"{what}: the loss is not finite after step {step}; lower the learning rates, or see whether the "
            "model that it began with is sound"
        )


@contextmanager
def _bar(run: Run, what: str) -> Iterator[Tracker]:
    """Tokens that are left; the main process tells."""
    if not run.devices.main:
        yield SILENT
        return
    done = run.progress.step
    with track((run.steps - done) * run.step_tokens, what, "tokens") as bar:
        if done:
            bar.note(f"{what}: goes on after step {done} of {run.steps}")
        yield bar
