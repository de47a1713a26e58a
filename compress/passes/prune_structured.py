"""prune_structured: heads, neurons, channels and blocks taken out for good, the rest refitted.

What goes together is read off torch-pruning's dependency graph: a key-value head with its query heads, a
neuron with its rows in gate and up, a channel of the residual stream with everything that reads or writes
it. Every block keeps the same number, since a stock configuration holds one number for all; which ones is
chosen per block. The layers that read what is left are refitted by least squares, block by block, each
through the blocks already pruned. The result is smaller and faster in every runtime, without a kernel of
its own, and wants healing: `distill` after it.

Either shares say how much goes, or a target says what may be left: parameters, bytes of the file, or time
per token measured on this machine. Shapes that meet it are tried out on a few windows (structured/target.py),
and where the best of them loses more than `largest_loss`, the target is refused with what can be had.

A quarter of the parameters in SmolLM2-135M's blocks taken at once, 8 windows of 1024 tokens, rise of the loss
on 4 held-out ones: neurons by reconstruction and refit 0.60; a third of the heads and fewer neurons so 0.60;
by taylor 0.69, with refit 0.71; eight whole blocks 1.11; neurons by magnitude, without refit, 11.3.

An encoder of BERT's kind has no field for fewer heads of the same width: they are closed, that is zero in the
checkpoint, and left out of its ONNX graph (structured/closing.py). A target keeps them, since files would not
be smaller. Encoders are judged by what their heads are for: labelled training texts, hidden tokens,
embeddings (structured/probes.py); a latency is that of a text of 128 tokens.

Papers and equations: structured/structure.py, structured/importance.py, solvers/least_squares.py.
Cost: two passes over the calibration windows, and about in^3 per reader for choosing by reconstruction.
Limits: blocks of one kind (attention and a dense MLP); no mixture of experts.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.models.attention_layers import closable
from compress.models.layers import linear_layers
from compress.models.stacks import decoder_blocks
from compress.passes.base import Kind, Need, Pass
from compress.structured.costs import Costs
from compress.structured.judging import Judge, shape_for
from compress.structured.probes import Prober
from compress.structured.procedure import How, ModelShape, prune
from compress.structured.selection import Importance, Refit
from compress.structured.slicing import UnitCounts
from compress.structured.structure import Structure, find_structure, require_torch_pruning
from compress.structured.target import CostTarget
from compress.structured.width import require_free_width


class PruneStructured(Pass):
    """Remove whole heads, neurons, channels and blocks; refit the layers that read the rest."""

    kind: ClassVar[Kind] = "prune"
    resizes: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    uses_labels: ClassVar[bool] = True
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    heads: float = Field(0.0, ge=0, lt=1, description="share of the key-value heads, with their query heads")
    neurons: float = Field(0.0, ge=0, lt=1, description="share of the MLP's neurons")
    width: float = Field(0.0, ge=0, lt=1, description="share of the residual stream's channels")
    blocks: float = Field(0.0, ge=0, lt=1, description="share of the blocks")
    target: CostTarget | None = Field(None, description="what may be left, in the place of shares")
    importance: Importance = Field("reconstruction", description="how units are chosen")
    refit: Refit | None = Field(
        Refit(), description="least squares of the layers that follow; null: leave them"
    )
    kl_windows: int = Field(2, ge=1, le=1024, description="calibration windows for the importance `kl`")
    multiple_of: int = Field(
        32, ge=1, le=1024, description="neurons and width stay multiples of this where they were"
    )

    @model_validator(mode="after")
    def _shares_or_target(self) -> "PruneStructured":
        shares = bool(self.heads or self.neurons or self.width or self.blocks)
        if shares == (self.target is not None):
            raise ValueError("give shares of heads, neurons, width or blocks, or a target, and not both")
        return self

    def layers(self, model: nn.Module) -> list[str]:
        """All linear layers of the blocks: each loses rows or columns, or is gone.

        Raises:
            UserError: torch-pruning is absent, or the model's width has to stay.
        """
        require_torch_pruning()
        if self.width:
            require_free_width(model, f"{self.name()}.width")
        return linear_layers(model)

    def share_left(self, model: nn.Module) -> float:
        """As the target has it, or roughly by the shares: heads are a third of a block, neurons the rest."""
        whole = sum(p.numel() for p in model.parameters())
        blocks = sum(p.numel() for block in decoder_blocks(model)[1] for p in block.parameters())
        if self.target is None:
            stay = closable(model) and self.width != self.heads  # as zeros
            heads = 0.0 if stay else self.heads
            left = (1 - self.blocks) * (1 - (heads + 2 * self.neurons) / 3)
            return (1 - self.width) * (1 - blocks / whole * (1 - left))
        size = {"block_parameters": blocks, "bytes": 4 * whole}.get(self.target.measure, whole)
        left = self.target.value if self.target.value <= 1 else self.target.value / size
        if self.target.measure == "block_parameters":
            left = 1 - blocks / whole * (1 - left)
        return min(1.0, left)

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """The forward passes of both streams, the solvers in float64, and shapes that are tried on little."""
        shapes = 0 if self.target is None else self.target.shapes
        return 6.5 * parameters * calibration_tokens + shapes * 20_000.0 * parameters

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Prune a copy; notes tell what is left, what was, and the readers' relative errors.

        Raises:
            UserError: the graph or the configuration of this architecture does not allow it, or the target
                cannot be met.
        """
        result = bundle.clone()
        model = result.model.to(context.device)
        windows = torch.from_numpy(context.data.calibration.tokens).long().to(context.device)
        before = sum(p.numel() for p in model.parameters())
        structure = find_structure(model)
        _, blocks = decoder_blocks(model)
        whole = ModelShape(len(blocks), UnitCounts.of(structure))
        prober = Prober(context.data.labelled, bundle.tokenizer.mask_token_id)
        how = How(self.importance, self.refit, self.kl_windows, context.precision, prober)
        notes: dict[str, Any] = {}
        if self.target is None:
            shape = self._shares(whole)
        else:
            shape, notes = self._within(self.target, bundle, model, structure, windows, how)
        pruned = prune(model, structure, shape, windows, how, bundle.masks)
        after = sum(p.numel() for p in pruned.model.parameters())
        errors = pruned.errors
        if pruned.closed:
            notes["closed_heads"] = {
                "per_block": pruned.closed,
                "of": whole.counts.heads,
                "kept_as_zeros": f"model_type '{model.config.model_type}' has no field for fewer "
                "heads of the same width; graphs of ONNX leave them out, torch and the checkpoint do not",
            }
        notes |= {
            "left": {"blocks": shape.layers, **vars(shape.counts)},
            "of": {"blocks": whole.layers, **vars(whole.counts)},
            "kept_blocks": pruned.blocks,
            "parameters_removed": before - after,
            "parameters": after,
        }
        if errors:
            notes["mean_output_error"] = sum(errors.values()) / len(errors)
            notes["worst_output_error"] = max(errors.items(), key=lambda item: item[1])
        return result.evolve(model=pruned.model.cpu(), masks=pruned.masks, exports={}, notes=notes)

    def _shares(self, whole: ModelShape) -> ModelShape:
        counts = UnitCounts(
            max(1, round((1 - self.heads) * whole.counts.heads)),
            _multiple((1 - self.neurons) * whole.counts.neurons, whole.counts.neurons, self.multiple_of),
            _multiple((1 - self.width) * whole.counts.width, whole.counts.width, self.multiple_of),
        )
        shape = ModelShape(max(1, round((1 - self.blocks) * whole.layers)), counts)
        if shape == whole:
            raise UserError(
                f"prune_structured: the shares remove nothing of {whole.layers} blocks of "
                f"{whole.counts.heads} key-value heads and {whole.counts.neurons} neurons; "
                "give larger ones, or a smaller multiple_of"
            )
        return shape

    def _within(
        self, target: CostTarget, bundle: Bundle, model: Any, structure: Structure, windows: Tensor, how: How
    ) -> tuple[ModelShape, dict[str, Any]]:
        """The best shape that meets the target, and notes that tell what was measured."""

        def trial(shape: ModelShape, few: Tensor) -> Any:
            copy = bundle.clone().model.to(windows.device)
            return prune(copy, structure, shape, few, how, bundle.masks).model

        costs = Costs(model, structure, target.measure)
        judges: list[Judge] = []

        def judge() -> Judge:
            if not judges:
                judges.append(Judge(trial, model, windows, target, how.prober))
            return judges[0]

        return shape_for(target, costs, self.multiple_of, judge)


def _multiple(wanted: float, whole: int, multiple: int) -> int:
    """The nearest multiple, at least one; of 1 where the whole is no multiple itself."""
    step = multiple if whole % multiple == 0 else 1
    return min(whole, max(step, step * round(wanted / step)))
