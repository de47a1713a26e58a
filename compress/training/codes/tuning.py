"""The loop of end-to-end tuning: few parameters, the original model as teacher, the best point kept.

    minimise  mean over positions of KL(p_original || p_tuned)

by Adam over parameters that are either relative shifts of scales (training/codes/scales.py) or small vectors
(norm gains, biases), each of whose elements moves in proportion to its own size. The first steps of Adam are
as long as its rate in every coordinate, and over a million scales that adds up: the rate rises linearly over
the first steps, then falls along a cosine to zero. At evenly spaced checks the KL on held-out windows is
measured with the numbers that would ship; the start counts as a check, the best one is what is returned, and
a run that has not improved for some checks ends. So the held-out KL never rises; if it does not fall, that
is said.

Differs from training/loop.py in what it watches (held-out KL, not the text's loss), in keeping the best
point, and in that nothing of the model but a few vectors is trained, stored in checkpoints or hashed.

Same seed, same thread count: same result, also across kills.
"""

import time
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.context import TrainingContext
from compress.host.progress import Tracker, track
from compress.models.running import Precision, autocast, backward_passes
from compress.training import checkpoint
from compress.training.batches import Batches
from compress.training.codes.scales import use_masters
from compress.training.identity import digest_of
from compress.training.objectives.losses import chunked, forward_kl
from compress.training.optimizers import schedule_factor

_HELDOUT_TOKENS = 2048  # per forward pass
_LOSS_ELEMENTS = 2**20  # logits per block of the loss: 4 MB stay in the cache, four times faster than 100 MB
_SMALLEST_UNIT = 1e-3  # of the rate of a vector that starts at zero


class Tuning(BaseModel):
    """How to tune: the fields that tuning passes share."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    incidental: ClassVar[frozenset[str]] = frozenset({"checkpoint_seconds"})

    tokens: int = Field(100_000, ge=1, description="tokens to tune on, rounded up to whole steps")
    batch: int = Field(4, ge=1, le=4096, description="windows per step")
    window: int = Field(
        256, ge=8, le=65536, description="tokens per window; data.window where that is shorter"
    )
    learning_rate: float = Field(5e-4, gt=0, le=1, description="relative change of a scale per step")
    vector_rate: float = Field(
        2.0, ge=0, le=100, description="of norm gains and biases, as a share of that; 0: scales only"
    )
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps")
    checks: int = Field(5, ge=1, le=1000, description="held-out KLs on the way")
    heldout_tokens: int = Field(4096, ge=8, description="of the held-out windows: the first that fit")
    patience: int = Field(3, ge=1, le=1000, description="checks without a gain that end the run")
    checkpoint_seconds: float = Field(20.0, ge=0, description="between checkpoints")


@dataclass
class TuningProgress:
    """How far a run is: what a checkpoint holds beside tensors.

    Attributes:
        identity: digest of all that decides the result.
        before: held-out KL of the start.
        best: lowest held-out KL so far.
        best_step: the step after which it was met; 0: the start.
        step: steps done.
        stale: checks since the best.
        seconds: spent in steps and checks.
        losses: of the steps since the last check.
        curve: [step, tokens, mean KL of the steps since the last check, held-out KL] per check.
    """

    identity: str
    before: float
    best: float
    best_step: int = 0
    step: int = 0
    stale: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[list[float | int]] = field(default_factory=list)


class _Tuned(nn.Module):
    """The parameters as they are and as they were at the best check."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.now = nn.ParameterList(parameters)
        self.best = nn.ParameterList(
            nn.Parameter(p.detach().clone(), requires_grad=False) for p in parameters
        )

    @torch.no_grad()
    def keep(self) -> None:
        for best, now in zip(self.best, self.now, strict=True):
            best.copy_(now)

    @torch.no_grad()
    def restore(self) -> None:
        for best, now in zip(self.best, self.now, strict=True):
            now.copy_(best)


def tune(
    model: Any,
    teacher: Any,
    parameters: list[nn.Parameter],
    units: list[Tensor | None],
    plan: Tuning,
    stream: NDArray[np.int32],
    context: TrainingContext,
    *,
    digests: str,
    what: str,
) -> dict[str, Any]:
    """Tune `parameters` of `model` in place, to the point of the lowest held-out KL, the start included.

    Args:
        model: gives `.logits`; may hold tunable layers.
        teacher: the original model, on the same device.
        parameters: those to tune, float32; all others must not require a gradient.
        units: what each parameter's steps are multiplied by, elementwise; None: 1.
        plan: the settings.
        stream: text to tune on, int32 (tokens,).
        context: seed, precision, longest window, held-out windows, and where the checkpoint lives.
        digests: of both models; a checkpoint of others is ignored.
        what: the label of the progress bar.

    Returns:
        Notes: `heldout_kl_before`, `heldout_kl_after`, `gain` (text), `tokens`, `steps`, `best_step`,
        `seconds`, `curve` as in `TuningProgress`.

    Raises:
        UserError: the text does not fill one batch.
    """
    window, precision = min(plan.window, context.data.window), context.precision
    batches = Batches(stream, window, plan.batch, context.seed, begin=context.data.begin).check()
    step_tokens = plan.batch * window
    steps = max(1, -(-plan.tokens // step_tokens))
    checks = {steps * (i + 1) // plan.checks for i in range(plan.checks)} - {0}
    device = parameters[0].device
    tuned = _Tuned(parameters)
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99), fused=True)
    heldout = context.data.heldout.tokens
    judges = heldout[: max(1, plan.heldout_tokens // heldout.shape[1])]
    held = torch.from_numpy(judges.astype(np.int64)).to(device)
    settings = plan.model_dump(mode="json", exclude=set(Tuning.incidental))
    found = batches.identity([settings, precision, digests, digest_of([("heldout", held)])])
    path = context.workdir / "tuning.safetensors"
    model.eval()
    teacher.eval()
    with backward_passes(model, teacher):
        restored = checkpoint.restore(path, tuned, [optimizer], found)
        if restored is None:
            began = time.monotonic()
            before = heldout_kl(model, teacher, held, precision)
            progress = TuningProgress(found, before, before, seconds=time.monotonic() - began)
        else:
            progress = TuningProgress(**restored)
        saved = time.monotonic()
        with track((steps - progress.step) * step_tokens, what, "tokens") as bar:
            while progress.step < steps and progress.stale < plan.patience:
                began = time.monotonic()
                factor = schedule_factor("cosine", progress.step, steps, plan.warmup, 0.0)
                optimizer.param_groups[0]["lr"] = plan.learning_rate * factor
                inputs = torch.from_numpy(batches(progress.step)[:, :-1]).to(device)
                progress.losses.append(_backward(model, teacher, inputs, precision))
                _update(optimizer, units)
                progress.step += 1
                if progress.step in checks:
                    _check(progress, tuned, heldout_kl(model, teacher, held, precision), step_tokens)
                progress.seconds += time.monotonic() - began
                _show(bar, progress, step_tokens)
                if time.monotonic() - saved >= plan.checkpoint_seconds:
                    checkpoint.save(path, tuned, [optimizer], asdict(progress))
                    saved = time.monotonic()
    tuned.restore()
    return _notes(progress, step_tokens)


def _backward(model: Any, teacher: Any, inputs: Tensor, precision: Precision) -> float:
    """The gradient of the KL on `inputs` (windows, length), added to the parameters'; returns the KL."""
    use_masters(model, True)  # and nothing else of train mode: dropout would only blur the few parameters
    with autocast(inputs.device, precision):
        with torch.no_grad():
            wanted = teacher(input_ids=inputs, use_cache=False).logits.flatten(0, 1)  # (rows, vocabulary)
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
    loss = chunked(forward_kl, logits, wanted, rows=_rows(logits))
    loss.backward()
    use_masters(model, False)
    return float(loss.detach())


@torch.no_grad()
def _update(optimizer: torch.optim.Optimizer, units: list[Tensor | None]) -> None:
    """One step of Adam, each element's length multiplied by its unit; drops the gradients."""
    parameters = optimizer.param_groups[0]["params"]
    scaled = [
        (p, p.clone(), unit) for p, unit in zip(parameters, units, strict=True) if isinstance(unit, Tensor)
    ]
    optimizer.step()
    for parameter, before, unit in scaled:
        parameter.copy_(before + (parameter - before) * unit)
    optimizer.zero_grad(set_to_none=True)


def _check(progress: TuningProgress, tuned: _Tuned, kl: float, step_tokens: int) -> None:
    """Record a held-out KL and keep the parameters if it is the lowest."""
    mean = sum(progress.losses) / len(progress.losses)
    progress.curve.append([progress.step, progress.step * step_tokens, mean, kl])
    progress.losses.clear()
    if kl < progress.best:  # never true of a NaN
        progress.best, progress.best_step, progress.stale = kl, progress.step, 0
        tuned.keep()
    else:
        progress.stale += 1


def _show(bar: Tracker, progress: TuningProgress, step_tokens: int) -> None:
    heldout = progress.curve[-1][3] if progress.curve else progress.before
    bar.advance(step_tokens, held_out_KL=f"{progress.before:.4f} -> {heldout:.4f}")


def _notes(progress: TuningProgress, step_tokens: int) -> dict[str, Any]:
    fell = 1 - progress.best / progress.before if progress.best_step else 0.0
    return {
        "heldout_kl_before": progress.before,
        "heldout_kl_after": progress.best,
        "gain": f"held-out KL fell by {100 * fell:.0f} %" if progress.best_step else "no gain",
        "tokens": progress.step * step_tokens,
        "steps": progress.step,
        "best_step": progress.best_step,
        "seconds": round(progress.seconds, 1),
        "curve": progress.curve,
    }


@torch.no_grad()
def heldout_kl(model: Any, teacher: Any, windows: Tensor, precision: Precision) -> float:
    """Mean over predicted positions of KL(p_teacher || p_model), windows (n, length), in nats.

    In the precision of tuning, for the choice of a point; the reported KL is `compress.measure`'s.
    """
    total = 0.0
    for rows in windows.split(max(1, _HELDOUT_TOKENS // windows.shape[1])):
        with autocast(windows.device, precision):
            wanted = teacher(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
        for z, y in zip(logits.split(_rows(logits)), wanted.split(_rows(logits)), strict=True):
            total += float(forward_kl(z, y)) * len(z)
    return max(total, 0.0) / (windows.shape[0] * (windows.shape[1] - 1))  # rounding may leave -1e-9


def _rows(logits: Tensor) -> int:
    return max(1, _LOSS_ELEMENTS // logits.shape[-1])


def units_of(vectors: list[nn.Parameter], share: float) -> list[Tensor]:
    """The size of each element, times `share`; small ones count as a hundredth of their vector's mean."""
    sizes = [vector.detach().abs() for vector in vectors]
    means = [max(float(size.mean()), _SMALLEST_UNIT) for size in sizes]
    return [share * size.clamp(min=mean / 100) for size, mean in zip(sizes, means, strict=True)]
