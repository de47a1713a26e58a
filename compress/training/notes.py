"""What the record of a training step says: facts, as JSON values, nothing formatted."""

from typing import Any

from torch import nn

from compress.training.setup import Run


def notes(run: Run, model: nn.Module) -> dict[str, Any]:
    """On a finished run and the model that it trained; the objective's own first."""
    progress, best = run.progress, run.progress.best
    parameters = sum(p.numel() for p in model.parameters())
    tokens = progress.step * run.step_tokens
    return {
        **run.objective.notes,
        "tokens": tokens,
        "steps": progress.step,
        "epochs": round(progress.step * run.batches.batch / run.batches.windows, 3),
        "parameters": parameters,
        "tokens_per_parameter": round(tokens / parameters, 3),
        "tokens_per_second": round(tokens / progress.seconds, 1),
        "precision": run.precision,
        "processes": run.devices.count,
        "heldout_before": progress.heldout_before,
        "heldout_after": best.score,
        "kept": ("average" if best.averaged else "weights") + f" of step {best.step}",
        "stopped_early": progress.step < run.steps,
        "average_curve": progress.average_curve,
        "loss_curve": progress.curve,
    }
