"""How to optimise: the fields that every training pass shares."""

from math import ceil
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from compress.errors import UserError
from compress.host.processes import process
from compress.models.running import Precision
from compress.tasks.base import longest_text
from compress.training import depths, optimizers, rates
from compress.training import trackers as tracking
from compress.training.averaging import AverageName
from compress.training.batches import Material

PrecisionName = Literal["auto", "float32", "bfloat16"]


class Optimization(BaseModel):
    """Settings of the loop; defaults suit small models trained from scratch with Muon."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    incidental: ClassVar[frozenset[str]] = frozenset({"checkpoint_seconds", "trackers"})

    tokens: int = Field(1_000_000, ge=1, description="tokens to train on, rounded up to whole steps")
    epochs: float | None = Field(
        None, gt=0, le=1e6, description="times to go through all there is to learn from, instead of tokens"
    )
    batch: int = Field(8, ge=1, le=4096, description="windows per micro-batch")
    accumulate: int = Field(1, ge=1, le=4096, description="micro-batches per step")
    window: int | None = Field(None, ge=8, le=65536, description="tokens per window; data.window if absent")
    optimizer: optimizers.OptimizerName = Field(
        "muon", description="muon: matrices by Muon, the rest by AdamW"
    )
    learning_rate: float = Field(4e-3, gt=0, le=10, description="of every optimizer but Muon")
    muon_learning_rate: float = Field(0.012, gt=0, le=1, description="Muon's, for the matrices in the blocks")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's (Nesterov)")
    weight_decay: float = Field(0.0, ge=0, le=1, description="on the matrices in the blocks")
    schedule: optimizers.ScheduleName = Field(
        "wsd", description="of the rates; wsd: warm-up, stable, linear decay to 0"
    )
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps")
    decay: float = Field(0.5, ge=0, le=1, description="share of the steps (wsd only)")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    freeze: tuple[str, ...] = Field((), description="wildcards of modules that do not learn")
    slower: tuple[rates.Slower, ...] = Field((), description="modules with a factor on their learning rate")
    last_blocks: int | None = Field(
        None, ge=0, le=10_000, description="only so many blocks, the last, and what comes after them learn"
    )
    unfreeze: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the steps over which blocks begin to learn, the last ones first",
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor on the rate per block away from the head; embeddings learn slowest",
    )
    centralise: bool = Field(False, description="take off each matrix's gradient its mean over the inputs")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="of all dropout layers while it trains; null: what the model has"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again for the gradient: less memory, a third more time"
    )
    precision: PrecisionName = Field(
        "auto", description="of the forward passes; auto: bfloat16 where the machine multiplies it natively"
    )
    average: AverageName = Field(
        "none", description="of the weights, kept where its held-out loss is lower; ema, or tail: plain mean"
    )
    average_share: float = Field(
        0.1, gt=0, le=1, description="share of the steps: ema's horizon, the tail's length"
    )
    patience: int | None = Field(
        None, ge=1, le=1000, description="held-out points without a gain that end the run; keeps the best"
    )
    heldout_points: int = Field(8, ge=1, le=1000, description="held-out losses on the way")
    checkpoint_seconds: float = Field(20.0, ge=0, description="between checkpoints")
    trackers: tuple[tracking.TrackerName, ...] = Field(
        (), description="where curves go besides the report, below the run's folder: logs/"
    )

    def steps(self, material: Material) -> int:
        """Steps that hold at least `tokens` tokens, or `epochs` epochs."""
        if self.epochs is not None:
            return max(1, ceil(self.epochs * material.windows / material.batch))
        return max(1, -(-self.tokens // material.step_tokens))

    @property
    def windows(self) -> int:
        """Windows per step, over all micro-batches and processes."""
        return self.batch * self.accumulate

    def scores_after(self, step: int, steps: int) -> bool:
        """Whether a held-out loss is due after step 0 .. steps - 1.

        >>> [step for step in range(10) if Optimization(heldout_points=3).scores_after(step, 10)]
        [3, 6, 9]
        """
        return (step + 1) * self.heldout_points // steps > step * self.heldout_points // steps

    def precision_on(self, machine: Precision) -> Precision:
        """What the forward passes compute in on a machine that computes in `machine` by itself."""
        return machine if self.precision == "auto" else self.precision

    def deciding(self, precision: Precision) -> dict[str, Any]:
        """The settings that decide the result, with the precision that `auto` stands for here; when
        checkpoints are written is no part of it.
        """
        settings = self.model_dump(mode="json", exclude=set(Optimization.incidental))
        return settings | {"precision": precision}

    def held(self, model: nn.Module) -> set[str]:
        """Names of the parameters that do not learn at all."""
        names = {name for pattern in self.freeze for name in rates.chosen(model, pattern)}
        return names | depths.below(model, self.last_blocks)

    def check(self, model: nn.Module) -> None:
        """Refuse what can be known to fail: too long windows, a batch that cannot be shared, no such tracker,
        no such module, nothing that learns.

        Raises:
            UserError: in one line. The model may hold no data.
        """
        if self.window is not None and self.window > (longest := longest_text(model)):
            raise UserError(f"window: {self.window} tokens, but the model takes at most {longest}")
        count = process()[1]
        if self.windows % count:
            raise UserError(
                f"batch: {self.windows} windows per step (batch x accumulate) cannot be dealt out to {count} "
                f"processes; take a multiple of {count}"
            )
        tracking.check(self.trackers)
        rates.check(model, self.freeze, self.slower)
        depths.require_dropout(model, self.dropout)
        depths.require_blocks(model, self.last_blocks)
        if self.last_blocks is not None and self._holds_all(model):
            raise UserError(
                f"last_blocks: {self.last_blocks} with freeze: {list(self.freeze)} leaves nothing to train; "
                "take more blocks, or freeze fewer modules"
            )

    def _holds_all(self, model: nn.Module) -> bool:
        """Whether nothing learns; False of a model without data that cannot be called so."""
        try:
            held = self.held(model)
        except (RuntimeError, NotImplementedError):
            if next(model.parameters()).is_meta:
                return False
            raise
        return held == {name for name, _ in model.named_parameters()}
