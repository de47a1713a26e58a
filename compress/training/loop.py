"""The one optimisation loop: base training, healing and distillation differ in their task only.

A step takes its windows (`batches`), computes the loss on micro-batches, averages the gradient over them
and over processes (`devices`), clips it to a norm, updates, and puts pruned weights back to zero
(`masking`). At held-out points it is decided which weights to keep (`stopping`, `averaging`). Parameters and
states are float32; the forward pass runs under autocast in `precision`.

Same seed, same thread count: same weights, also across kills. The order of data and the dropout are pure
functions of (seed, step), and the clock decides only when a checkpoint is written.
"""

import copy
import hashlib
import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.context import Surroundings
from compress.errors import UserError
from compress.host.progress import SILENT, track
from compress.models.running import autocast, backward_passes, gradient_checkpointing, heldout_nll
from compress.training import checkpoint, rates, sharding
from compress.training.averaging import Average
from compress.training.batches import Batches
from compress.training.devices import Devices
from compress.training.masking import Masks
from compress.training.plan import Optimization
from compress.training.scheduled import Scheduled
from compress.training.state import Progress
from compress.training.stopping import Keeper, Verdict
from compress.training.task import Moment, Task
from compress.training.trackers import tracking

_CURVE_POINTS = 100


def optimise(
    model: Any,
    plan: Optimization,
    task: Task,
    around: Surroundings,
    *,
    masks: Mapping[str, Tensor] | None = None,
    identity: str = "",
    what: str = "training",
) -> dict[str, Any]:
    """Train `model` in place; it comes back on the CPU, in eval mode.

    Args:
        model: a causal language model in float32.
        plan: the settings.
        task: what to minimise, and what belongs to it.
        around: text, seed, device, and where the checkpoint lives.
        masks: module name -> bool (out, in); False stays exactly zero. Written to where the task has a
            schedule of masks: in the end they are those of the result.
        identity: what else the result depends on (a teacher's digest): a checkpoint of another is ignored.
        what: the label of the progress bar.

    Returns:
        Facts for the record, `loss_curve` [[step, tokens, loss, heldout or None], ...] among them.

    Raises:
        UserError: the text does not fill one batch, or wildcards of the plan fit nothing.
    """
    plan.check(model)
    run = _Run(model, plan, task, around)
    with ExitStack() as during:
        during.enter_context(backward_passes(run.model))
        during.enter_context(_random_numbers(run.device))
        during.enter_context(rates.frozen(run.model, plan.freeze))
        during.enter_context(gradient_checkpointing(run.model, plan.gradient_checkpointing))
        during.enter_context(task.watch(run.model))
        during.enter_context(tracking(run.devices.accelerator, run.logs, plan.trackers, plan.deciding()))
        run.begin(masks or {}, identity)
        run.train(what)
        run.finish(model)
        if task.masks is not None:
            for name, kept in run.masks.kept().items():
                (masks or {})[name].copy_(kept)
    return run.notes(model)


class _Run:
    """One optimisation: what it works on, and how far it is."""

    state: Progress

    def __init__(
        self,
        model: Any,
        plan: Optimization,
        task: Task,
        around: Surroundings,
    ) -> None:
        self.plan, self.task, self.seed = plan, task, around.seed
        self.device, self.precision = around.device, around.precision
        self.path = around.workdir / "training.safetensors"
        self.logs = around.logs or around.workdir / "logs"
        window, batch = plan.window or around.data.window, plan.batch * plan.accumulate
        self.batches = Batches(around.data.train, window, batch, around.seed, task.moving).check()
        self.devices = Devices(self.device, plan.trackers, self.logs)
        # sharding changes a model for good: it gets a copy, and the result is copied back
        self.model = (copy.deepcopy(model) if self.devices.sharded else model).to(self.device)
        self.heldout = torch.from_numpy(around.data.heldout.tokens.astype(np.int64)).to(self.device)
        self.steps = plan.steps(window)
        self.step_tokens = batch * window

    def begin(self, masks: Mapping[str, Tensor], identity: str) -> None:
        """Set up what a step needs, and go on where a killed run was."""
        plan, model, task = self.plan, self.model, self.task
        self.masks = Masks(model, masks)
        self.masks.weights()
        identity = _identity(self, identity)
        factors = rates.factors(model, plan.slower)
        self.wrapped = self.devices.wrap(model)
        self.extra = task.extra.to(self.device)
        self.trained = _Together(model, self.extra) if any(True for _ in self.extra.parameters()) else model
        self.masks.refresh()
        self.optimisers = Scheduled(model, self.extra, plan, self.steps, factors, self.precision)
        self.average = Average(model, plan.average, plan.average_share, self.steps)
        self.keeper = Keeper(model, plan.patience)
        self.others = {f"average.{name}": value for name, value in self.average.tensors.items()}
        self.others |= {f"best.{name}": value for name, value in self.keeper.tensors.items()}
        if task.masks is not None:
            self.others |= {f"mask.{name}": value for name, value in self.masks.tensors.items()}
        restored = checkpoint.restore(self.path, self.trained, self.optimisers.parts, identity, self.others)
        if restored is None:
            before = self._score()
            start = float("inf") if task.judge_from else before
            self.state = Progress(identity, heldout_before=before, verdict=Verdict(start))
        else:
            self.state = Progress(**{**restored, "verdict": Verdict(**restored["verdict"])})
            self.masks.refresh()

    def train(self, what: str) -> None:
        """All steps that are left."""
        state = self.state
        self.model.train()
        saved = time.monotonic()
        left = (self.steps - state.step) * self.step_tokens
        with track(left, what, "tokens") if self.devices.main else nullcontext(SILENT) as bar:
            if state.step and self.devices.main:
                bar.note(f"{what}: goes on after step {state.step} of {self.steps}")
            while state.step < self.steps and not self.keeper.done(state.verdict):
                began = time.monotonic()
                step = state.step
                loss = self._step(step)
                due = (step + 1) * self.plan.heldout_points // self.steps
                score = self._score() if due > step * self.plan.heldout_points // self.steps else None
                value = self.devices.mean(loss)
                if not math.isfinite(value) or (score is not None and not math.isfinite(score)):
                    raise UserError(
                        f"{what}: the loss is not finite after step {step + 1}; lower the learning rates, or "
                        "see whether the model that it began with is sound"
                    )
                tokens = (step + 1) * self.step_tokens
                state.record(value, tokens, score, every=max(1, self.steps // _CURVE_POINTS))
                if score is not None:
                    self._judge(score)
                state.seconds += time.monotonic() - began
                pace = state.step * self.step_tokens / state.seconds
                bar.advance(self.step_tokens, loss=value, **{"tokens/s": f"{pace:,.0f}"})
                self.devices.log(state.step, loss=value, heldout=score, tokens=tokens)
                late = time.monotonic() - saved >= self.plan.checkpoint_seconds
                if state.step < self.steps and self.devices.agreed(late):
                    self._save()
                    saved = time.monotonic()

    def finish(self, model: Any) -> None:
        """Put the weights to keep into `model`, on the CPU."""
        if self.plan.patience is not None:
            self.keeper.restore()
        elif self.state.verdict.averaged:
            self.average.swap()
        self.masks.weights()
        if self.devices.sharded:
            with torch.no_grad():
                for (_, target), (_, source) in zip(
                    model.named_parameters(), self.model.named_parameters(), strict=True
                ):
                    target.copy_(sharding.whole(source))
        model.__dict__.pop("_is_accelerate_prepared", None)  # a later loop must prepare it anew
        model.cpu().eval()

    def notes(self, model: Any) -> dict[str, Any]:
        """Facts for the record."""
        state, verdict = self.state, self.state.verdict
        parameters = sum(p.numel() for p in model.parameters())
        tokens = state.step * self.step_tokens
        return {
            "tokens": tokens,
            "steps": state.step,
            "epochs": round(state.step * self.batches.batch / self.batches.windows, 3),
            "parameters": parameters,
            "tokens_per_parameter": round(tokens / parameters, 3),
            "tokens_per_second": round(tokens / state.seconds, 1),
            "precision": self.precision,
            "processes": self.devices.count,
            "heldout_before": state.heldout_before,
            "heldout_after": verdict.score,
            "kept": ("average" if verdict.averaged else "weights") + f" of step {verdict.step}",
            "stopped_early": state.step < self.steps,
            "average_curve": state.average_curve,
            "loss_curve": state.curve,
        }

    def _step(self, step: int) -> Tensor:
        """One update; the mean loss of this process's windows."""
        task, devices = self.task, self.devices
        if task.masks is not None:
            changed = task.masks(self.masks.layers, self.masks.kept, step, self.steps)
            if changed:
                self.masks.update(changed)
                self.masks.weights()
        # for dropout and sampling, if there are any; processes draw numbers of their own
        torch.manual_seed(((self.seed * 1_000_003 + step) * 1_009 + devices.rank) % 2**63)
        rows = torch.from_numpy(devices.share(self.batches(step))).to(self.device)
        numbers = devices.share(self.batches.numbers(step))
        parts = rows.chunk(self.plan.accumulate)
        loss, seen = torch.zeros((), device=self.device), 0
        for number, part in enumerate(parts, start=1):
            moment = Moment(step, self.steps, numbers[seen : seen + len(part)])
            seen += len(part)
            if task.rewrite is not None:
                part, start = task.rewrite(self.model, part, moment)
                moment = moment._replace(start=start)
            inputs, targets = part[:, :-1], part[:, 1:]  # (batch, window) each
            last = number == len(parts)
            with devices.apart(self.wrapped, last):
                with autocast(self.device, self.precision):
                    outputs = self.wrapped(input_ids=inputs, use_cache=False)
                mean = task.loss(outputs, inputs, targets, moment) * (len(part) / len(rows))
                devices.backward(mean, self.extra, last)
            loss += mean.detach()
        self.masks.gradients()
        # shards and whole tensors have no norm together
        clipped = [self.model, self.extra] if devices.sharded else [self.trained]
        for module in clipped:
            torch.nn.utils.clip_grad_norm_(module.parameters(), self.plan.clip)
        self.optimisers.step(step)
        self.masks.weights()
        self.average.update(step)
        return loss

    def _score(self) -> float:
        score = heldout_nll(self.model, self.heldout, self.precision)
        self.devices.rest(self.model)
        return score

    def _judge(self, score: float) -> None:
        """Keep the weights as they stand, or their average, if the held-out loss says so."""
        state, keeper = self.state, self.keeper
        if state.step < self.task.judge_from:
            return
        better = keeper.better(state.verdict, score)
        if better:
            state.verdict = Verdict(score, state.step)
            keeper.keep()
        if self.average.coefficient(state.step - 1) is not None:
            with self.average.swapped():
                self.masks.weights()
                mean = self._score()
                state.average_curve.append([state.step, mean])
                if mean < state.verdict.score:
                    better, state.verdict = True, Verdict(mean, state.step, averaged=True)
                    keeper.keep()
        if not better:
            state.verdict.stale += 1

    def _save(self) -> None:
        progress, main = asdict(self.state), self.devices.main
        checkpoint.save(self.path, self.trained, self.optimisers.parts, progress, self.others, main)


class _Together(nn.Module):
    """A model and what learns beside it, under one set of names."""

    def __init__(self, model: nn.Module, extra: nn.Module) -> None:
        super().__init__()
        self.model, self.extra = model, extra


def _random_numbers(device: torch.device) -> Any:
    """Leaves torch's generators as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _identity(run: _Run, more: str) -> str:
    """A digest of everything that decides the result."""
    digest = hashlib.sha256()
    batches = run.batches
    facts = [
        run.plan.deciding(), batches.window, batches.batch, batches.seed, batches.moving, run.precision, more
    ]  # fmt: skip
    digest.update(json.dumps(facts, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(batches.stream).data)
    digest.update(checkpoint.digest(run.model).encode())
    for kept in run.masks.kept().values():
        digest.update(kept.cpu().numpy().tobytes())
    return digest.hexdigest()
