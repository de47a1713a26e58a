"""The one optimisation loop: base training, healing and distillation differ in their objective only.

A step takes its windows (`batches`), computes the objective on micro-batches, averages the gradient over
them and over processes, clips it to a norm, updates, and puts pruned weights back to zero. Parameters and
states are float32; the forward pass runs under autocast in `precision`. Devices and processes are
`accelerate`'s business; precision is not, since its wrapper would stay on the model.

Same seed, same thread count: same weights, also across kills. The order of data and the dropout are pure
functions of (seed, step), and the clock decides only when a checkpoint is written.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.progress import track
from compress.training import checkpoint, optimizers
from compress.training.batches import Batches
from compress.training.forward import Precision, autocast, heldout_nll, plain_attention

# (model outputs with .logits (batch, window, vocab), inputs (batch, window), targets (batch, window)) -> mean
Objective = Callable[[Any, Tensor, Tensor], Tensor]
_CURVE_POINTS = 100


class Optimization(BaseModel):
    """How to optimise: the fields that every training pass shares."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(1_000_000, ge=1, description="tokens to train on, rounded up to whole steps")
    batch: int = Field(8, ge=1, le=4096, description="windows per micro-batch")
    accumulate: int = Field(1, ge=1, le=4096, description="micro-batches per step")
    window: int | None = Field(None, ge=8, le=65536, description="tokens per window; data.window if absent")
    optimizer: optimizers.OptimizerName = Field(
        "muon", description="muon: matrices by Muon, the rest by AdamW"
    )
    learning_rate: float = Field(4e-3, gt=0, le=1, description="AdamW's")
    muon_learning_rate: float = Field(0.012, gt=0, le=1, description="Muon's, for the matrices in the blocks")
    weight_decay: float = Field(0.0, ge=0, le=1, description="on the matrices in the blocks")
    schedule: optimizers.ScheduleName = Field("wsd", description="wsd: warm-up, stable, linear decay to 0")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps")
    decay: float = Field(0.5, ge=0, le=1, description="share of the steps (wsd only)")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    heldout_points: int = Field(8, ge=1, le=1000, description="held-out losses on the way")
    checkpoint_seconds: float = Field(20.0, ge=0, description="between checkpoints")

    def steps(self, window: int) -> int:
        """Steps that hold at least `tokens` tokens."""
        return max(1, -(-self.tokens // (self.batch * self.accumulate * window)))


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside tensors."""

    identity: str
    heldout_before: float
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    curve: list[list[float | int | None]] = field(default_factory=list)

    def record(self, loss: float, tokens: int, heldout: float | None, every: int) -> None:
        """Count a finished step; each `every` steps, and beside each held-out loss, a point of the curve."""
        self.step += 1
        self.loss_sum += loss
        self.loss_count += 1
        if self.step % every == 0 or heldout is not None:
            self.curve.append([self.step, tokens, self.loss_sum / self.loss_count, heldout])
            self.loss_sum, self.loss_count = 0.0, 0


def optimise(
    model: Any,
    plan: Optimization,
    objective: Objective,
    stream: NDArray[np.int32],
    heldout: NDArray[np.int32],
    *,
    window: int,
    seed: int,
    workdir: Path,
    device: torch.device,
    precision: Precision,
    masks: Mapping[str, Tensor] | None = None,
    identity: str = "",
    what: str = "training",
) -> dict[str, Any]:
    """Train `model` in place; it comes back on the CPU, in eval mode.

    Args:
        model: a causal language model in float32.
        plan: the settings.
        objective: what to minimise, given the model's outputs.
        stream: training tokens, int32 (tokens,).
        heldout: windows for the curve, int32 (n, length); scored by plain cross-entropy.
        window: inputs per window where the plan names none.
        seed: of data order and dropout.
        workdir: where the checkpoint lives.
        device: where to compute.
        precision: what the forward pass computes in.
        masks: module name -> bool (out, in); False stays exactly zero.
        identity: what else the result depends on (a teacher's digest): a checkpoint of another is ignored.
        what: the label of the progress bar.

    Returns:
        Facts for the record, `loss_curve` [[step, tokens, loss, heldout or None], ...] among them.

    Raises:
        UserError: the text does not fill one batch.
    """
    accelerator = _accelerator(device)
    window = plan.window or window
    batches = Batches(stream, window, plan.batch * plan.accumulate, seed).check()
    steps, step_tokens = plan.steps(window), batches.batch * window
    model.to(device)
    mask = _Mask(model, masks or {})
    mask.weights()
    identity = _identity(model, plan, batches, mask, precision, identity)
    optimiser = _Optimisers(model, plan, steps, precision)
    held = torch.from_numpy(heldout.astype(np.int64)).to(device)
    path = workdir / "training.safetensors"

    with plain_attention(model, window), _random_numbers(device):
        restored = checkpoint.restore(path, model, optimiser.parts, identity)
        if restored is None:
            state = Progress(identity, heldout_before=heldout_nll(model, held, precision))
        else:
            state = Progress(**restored)
        wrapped = accelerator.prepare(model)
        model.train()
        saved = time.monotonic()
        with track((steps - state.step) * step_tokens, what, "tokens") as bar:
            for step in range(state.step, steps):
                began = time.monotonic()
                torch.manual_seed((seed * 1_000_003 + step) % 2**63)  # for dropout, if the model has any
                rows = batches(step)[accelerator.process_index :: accelerator.num_processes]
                parts = torch.from_numpy(rows).to(device).chunk(plan.accumulate)
                loss = torch.zeros((), device=device)
                for number, part in enumerate(parts, start=1):
                    inputs, targets = part[:, :-1], part[:, 1:]  # (batch, window) each
                    with nullcontext() if number == len(parts) else accelerator.no_sync(wrapped):
                        with autocast(device, precision):
                            outputs = wrapped(input_ids=inputs, use_cache=False)
                        mean = objective(outputs, inputs, targets) / len(parts)
                        accelerator.backward(mean)
                    loss += mean.detach()
                mask.gradients()
                torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
                optimiser.step(step)
                mask.weights()

                due = (step + 1) * plan.heldout_points // steps > step * plan.heldout_points // steps
                score = heldout_nll(model, held, precision) if due else None
                value = float(accelerator.reduce(loss, reduction="mean"))
                state.record(value, (step + 1) * step_tokens, score, every=max(1, steps // _CURVE_POINTS))
                state.seconds += time.monotonic() - began
                pace = state.step * step_tokens / state.seconds
                bar.advance(step_tokens, loss=value, **{"tokens/s": f"{pace:,.0f}"})
                if state.step < steps and time.monotonic() - saved >= plan.checkpoint_seconds:
                    if accelerator.is_main_process:
                        checkpoint.save(path, model, optimiser.parts, asdict(state))
                    saved = time.monotonic()
    model.__dict__.pop("_is_accelerate_prepared", None)  # a later loop must prepare it anew
    model.cpu().eval()

    parameters = sum(p.numel() for p in model.parameters())
    return {
        "tokens": steps * step_tokens,
        "steps": steps,
        "epochs": round(steps * batches.batch / batches.windows, 3),
        "parameters": parameters,
        "tokens_per_parameter": round(steps * step_tokens / parameters, 3),
        "tokens_per_second": round(steps * step_tokens / state.seconds, 1),
        "precision": precision,
        "heldout_before": state.heldout_before,
        "heldout_after": state.curve[-1][3],
        "loss_curve": state.curve,
    }


class _Optimisers:
    """The optimisers of a run and their schedule."""

    def __init__(self, model: nn.Module, plan: Optimization, steps: int, precision: Precision) -> None:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.plan, self.steps = plan, steps
        self.parts = optimizers.build(
            model, plan.optimizer, plan.learning_rate, plan.muon_learning_rate, plan.weight_decay, dtype
        )
        self.rates = [[float(group["lr"]) for group in part.param_groups] for part in self.parts]

    def step(self, step: int) -> None:
        """Update the parameters with the rate of this step, and drop the gradients."""
        plan = self.plan
        factor = optimizers.schedule_factor(plan.schedule, step, self.steps, plan.warmup, plan.decay)
        for part, rates in zip(self.parts, self.rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)


class _Mask:
    """Keeps pruned weights, and their gradients, at exactly zero."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.dropped: list[tuple[nn.Parameter, Tensor]] = []
        for name, kept in masks.items():
            module = model.get_submodule(name)
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            transposed = type(module).__name__ == "Conv1D"  # GPT-2's layers; masks are (out, in) throughout
            self.dropped.append((weight, ~(kept.T if transposed else kept).to(weight.device)))

    @torch.no_grad()
    def weights(self) -> None:
        """Before the first and after every step: Muon's update, unlike its gradient, is dense."""
        for weight, dropped in self.dropped:
            weight.masked_fill_(dropped, 0.0)

    def gradients(self) -> None:
        """Before the norm is taken."""
        for weight, dropped in self.dropped:
            if weight.grad is not None:
                weight.grad.masked_fill_(dropped, 0.0)


def _accelerator(device: torch.device) -> Any:
    from accelerate import Accelerator

    return Accelerator(mixed_precision="no", cpu=device.type == "cpu")


def _random_numbers(device: torch.device) -> Any:
    """Leaves torch's generators as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _identity(
    model: nn.Module, plan: Optimization, batches: Batches, mask: _Mask, precision: str, more: str
) -> str:
    """A digest of everything that decides the result; when checkpoints are written is no part of it."""
    digest = hashlib.sha256()
    settings = plan.model_dump(mode="json", exclude={"checkpoint_seconds"})
    facts = [settings, batches.window, batches.batch, batches.seed, precision, more]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(batches.stream).data)
    digest.update(checkpoint.digest(model).encode())
    for _, dropped in mask.dropped:
        digest.update(dropped.cpu().numpy().tobytes())
    return digest.hexdigest()
