"""prune_structured: heads, neurons, channels and blocks taken out for good, the rest refitted.

What goes together is read off torch-pruning's dependency graph: a key-value head with its query heads, a
neuron with its rows in gate and up, a channel of the residual stream with everything that reads or writes
it. Every block keeps the same number, since a stock configuration holds one number for all; which ones is
chosen per block. The layers that read what is left are refitted by least squares, block by block, each
through the blocks already pruned. The result is smaller and faster in every runtime, without a kernel of
its own, and wants healing: `distill` after it.

Papers and equations: pruning/structure.py, pruning/importance.py, solvers/least_squares.py.
Cost: two passes over the calibration windows, and about in^3 per reader for choosing by reconstruction.
Limits: blocks of one kind (attention and a dense MLP); no mixture of experts.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.bundle import Bundle
from compress.calibration import decoder_blocks
from compress.errors import UserError
from compress.passes.base import Context, Kind, Need, Pass, linear_layers
from compress.pruning.blocks import block_influence, keep_blocks, renamed
from compress.pruning.importance import kl, taylor
from compress.pruning.selection import Importance, Refit, select
from compress.pruning.slicing import Counts, Kept, slice_masks, slice_model, smaller_config
from compress.pruning.structure import Structure, find_structure, require_torch_pruning
from compress.pruning.width import channel_scores, kept_channels, match_norms

_CHECK_TOKENS = 64
_CLOSE = 1e-3  # of the largest logit: what two ways to compute the same may differ by


class PruneStructured(Pass):
    """Remove whole heads, neurons, channels and blocks; refit the layers that read the rest."""

    kind: ClassVar[Kind] = "prune"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    heads: float = Field(0.0, ge=0, lt=1, description="share of the key-value heads, with their query heads")
    neurons: float = Field(0.0, ge=0, lt=1, description="share of the MLP's neurons")
    width: float = Field(0.0, ge=0, lt=1, description="share of the residual stream's channels")
    layers_removed: float = Field(0.0, ge=0, lt=1, description="share of the blocks")
    importance: Importance = Field("reconstruction", description="how units are chosen")
    refit: Refit | None = Field(
        Refit(), description="least squares of the layers that follow; null: leave them"
    )
    kl_windows: int = Field(2, ge=1, le=1024, description="calibration windows for the importance `kl`")
    multiple_of: int = Field(
        32, ge=1, le=1024, description="neurons and width stay multiples of this where they were"
    )

    @model_validator(mode="after")
    def _removes_something(self) -> "PruneStructured":
        if not (self.heads or self.neurons or self.width or self.layers_removed):
            raise ValueError("give a share of heads, neurons, width or layers_removed")
        return self

    def layers(self, model: nn.Module) -> list[str]:
        """All linear layers of the blocks: each loses rows or columns, or is gone.

        Raises:
            UserError: torch-pruning is absent.
        """
        require_torch_pruning()
        return linear_layers(model)

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """The forward passes of both streams."""
        return 2 * 2.0 * parameters * calibration_tokens

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Prune a copy; notes tell the old and new counts, parameters, and the readers' relative errors.

        Raises:
            UserError: the graph or the configuration of this architecture does not allow it.
        """
        result = bundle.clone()
        model = result.model.to(context.device)
        windows = torch.from_numpy(context.data.calibration.tokens).long().to(context.device)
        before = sum(p.numel() for p in model.parameters())
        masks, blocks = self._fewer_blocks(model, windows, dict(bundle.masks))
        structure = find_structure(model)
        whole = Counts.of(structure)
        counts = self._counts(structure)
        smaller_config(model.config, structure, counts)  # refuses before any work
        scores, stream = self._scores(model, windows, structure, counts)
        if counts.width < whole.width:
            stream = channel_scores(model, windows, structure, self.importance, stream)
        chosen = select(
            model, windows, structure, {"heads": counts.heads, "neurons": counts.neurons}, self.importance,
            scores, self.refit, masks=masks, precision=context.precision,
        )  # fmt: skip
        channels = torch.arange(whole.width)
        if counts.width < whole.width:
            assert stream is not None
            channels = kept_channels(stream, counts.width)
            match_norms(model, windows, structure, channels)
        kept = Kept(chosen.units, channels)
        smaller = slice_model(model, structure, kept)
        if counts.width == whole.width:
            _check(model, smaller, windows)
        after = sum(p.numel() for p in smaller.parameters())
        errors = chosen.errors
        notes = {
            "kept": {"blocks": blocks, **vars(counts)},
            "before": vars(whole),
            "parameters_removed": before - after,
            "parameters": after,
            "mean_output_error": sum(errors.values()) / len(errors) if errors else None,
            "worst_output_error": max(errors.items(), key=lambda item: item[1]) if errors else None,
        }
        return result.evolve(
            model=smaller.cpu(), masks=slice_masks(masks, model, structure, kept), exports={}, notes=notes
        )

    def _fewer_blocks(
        self, model: Any, windows: Tensor, masks: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[int]]:
        """Take out the blocks that change their input least; the masks and numbers of the others."""
        name, blocks = decoder_blocks(model)
        keep = max(1, round((1 - self.layers_removed) * len(blocks)))
        if keep == len(blocks):
            return masks, list(range(keep))
        influence = block_influence(model, blocks, windows)
        kept = sorted(sorted(range(len(blocks)), key=lambda i: -influence[i])[:keep])
        keep_blocks(model, name, kept)
        return renamed(masks, name, kept), kept

    def _counts(self, structure: Structure) -> Counts:
        whole = Counts.of(structure)
        return Counts(
            max(1, round((1 - self.heads) * whole.heads)),
            _multiple((1 - self.neurons) * whole.neurons, whole.neurons, self.multiple_of),
            _multiple((1 - self.width) * whole.width, whole.width, self.multiple_of),
        )

    def _scores(
        self, model: Any, windows: Tensor, structure: Structure, counts: Counts
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What is known before the walk."""
        if self.importance == "taylor":
            return taylor(model, windows, structure)
        if self.importance == "kl":
            whole = vars(Counts.of(structure))
            kinds = tuple(kind for kind in ("heads", "neurons") if getattr(counts, kind) < whole[kind])
            return kl(model, windows[: self.kl_windows], structure, kinds), None
        return {}, None


def _multiple(wanted: float, whole: int, multiple: int) -> int:
    """The nearest multiple, at least one; of 1 where the whole is no multiple itself."""
    step = multiple if whole % multiple == 0 else 1
    return min(whole, max(step, step * round(wanted / step)))


@torch.no_grad()
def _check(masked: Any, smaller: Any, windows: Tensor) -> None:
    """Refuse a result that computes something else than the model with zeros in the place of what went."""
    ids = windows[:1, :_CHECK_TOKENS]
    wanted, found = masked(input_ids=ids)[0], smaller(input_ids=ids)[0]
    difference = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-30))
    if not difference < _CLOSE:
        raise UserError(
            f"prune_structured: model_type '{masked.config.model_type}' computes something else once units "
            f"are taken out (by {difference:.1g}); its parts are not understood, take prune_layers instead"
        )
