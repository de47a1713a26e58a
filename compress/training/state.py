"""How far a run is: the part of a checkpoint that is no tensor, as JSON."""

from dataclasses import dataclass, field

from compress.training.stopping import Verdict


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside tensors."""

    identity: str
    heldout_before: float
    verdict: Verdict
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    curve: list[list[float | int | None]] = field(default_factory=list)
    average_curve: list[list[float | int]] = field(default_factory=list)

    def record(self, loss: float, tokens: int, heldout: float | None, every: int) -> None:
        """Count a finished step; each `every` steps, and beside each held-out loss, a point of the curve."""
        self.step += 1
        self.loss_sum += loss
        self.loss_count += 1
        if self.step % every == 0 or heldout is not None:
            self.curve.append([self.step, tokens, self.loss_sum / self.loss_count, heldout])
            self.loss_sum, self.loss_count = 0.0, 0
