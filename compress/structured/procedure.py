"""From a shape to a model of that shape: blocks, then units with refitted readers, then channels.

The steps in their order, each on the model that the one before left:

    1. blocks that change their input least go (structured/blocks.py);
    2. units go and readers are refitted, block by block (structured/selection.py);
    3. the stream's channels of the lowest score go, and norms are matched (structured/width.py);
    4. heads that the configuration cannot leave out are closed (structured/closing.py);
    5. what is kept is copied into a model of its own (structured/slicing.py), which must compute what the old
       one does with zeros in the place of what went.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.models.running import Precision
from compress.models.stacks import decoder_blocks
from compress.structured.blocks import keep_blocks, most_influential, renamed
from compress.structured.closing import close, closes
from compress.structured.importance import kl, magnitude, taylor
from compress.structured.probes import Prober
from compress.structured.selection import Importance, Refit, select
from compress.structured.slicing import Kept, UnitCounts, cut_masks, cuts_of, slice_model, smaller_config
from compress.structured.structure import Structure
from compress.structured.width import channel_scores, kept_channels, match_norms

_CHECK_TOKENS = 64
_CLOSE = 1e-3  # of the largest logit: what two ways to compute the same may differ by


@dataclass(frozen=True)
class ModelShape:
    """How many blocks there are, and what each has."""

    layers: int
    counts: UnitCounts


@dataclass(frozen=True)
class How:
    """The choices that do not change the shape."""

    importance: Importance
    refit: Refit | None
    kl_windows: int
    precision: Precision
    prober: Prober = field(default_factory=Prober)


@dataclass(frozen=True)
class Pruned:
    """The smaller model, its masks, the numbers of its blocks in the old one, its readers' errors, and how
    many closed heads each block has."""

    model: Any
    masks: dict[str, Tensor]
    blocks: list[int]
    errors: dict[str, float]
    closed: int = 0


def prune(
    model: Any,
    structure: Structure,
    shape: ModelShape,
    windows: Tensor,
    how: How,
    masks: Mapping[str, Tensor],
) -> Pruned:
    """A model of the shape; the one given is used up.

    Args:
        model: in float; changed.
        structure: its units.
        shape: not larger in anything.
        windows: calibration token ids (n, length).
        how: importance and refit.
        masks: module name -> bool (out, in); False stays exactly zero.

    Raises:
        UserError: the configuration cannot say it, or the result computes something else.
    """
    whole, counts = UnitCounts.of(structure), shape.counts
    closed = closes(model, structure, counts)
    made = UnitCounts(whole.heads if closed else counts.heads, counts.neurons, counts.width)
    smaller_config(model.config, structure, made)  # refuses before any work
    structure, blocks, masks = _fewer_blocks(model, structure, shape.layers, windows, masks)
    scores, stream = _scores(model, windows, structure, counts, how)
    if counts.width < whole.width:
        stream = channel_scores(model, windows, structure, how.importance, stream)
    chosen = select(
        model, windows, structure, {"heads": counts.heads, "neurons": counts.neurons}, how.importance,
        scores, how.refit, masks=masks, precision=how.precision,
    )  # fmt: skip
    channels, inside = torch.arange(whole.width), []
    if stream is not None and counts.width < whole.width:
        channels = kept_channels(stream, counts.width)
        match_norms(model, windows, structure, channels)
        inside = [kept_channels(magnitude(model, parts), counts.width) for parts in structure.inside_heads]
    units = chosen.units
    if closed:
        masks = close(model, structure, units, masks)
        units = units | {s.reader: torch.arange(s.units) for s in structure.of("heads")}
    kept = Kept(units, channels, inside)
    smaller = slice_model(model, structure, made, kept)
    if counts.width == whole.width:
        _check(model, smaller, windows)
    held = cut_masks(masks, cuts_of(structure, kept))
    return Pruned(smaller, held, blocks, chosen.errors, whole.heads - counts.heads if closed else 0)


def _fewer_blocks(
    model: Any, structure: Structure, keep: int, windows: Tensor, masks: Mapping[str, Tensor]
) -> tuple[Structure, list[int], Mapping[str, Tensor]]:
    """Take out the blocks that change their input least; structure, numbers and masks of the others."""
    name, blocks = decoder_blocks(model)
    if keep == len(blocks):
        return structure, list(range(keep)), masks
    kept = most_influential(model, blocks, windows, keep)
    keep_blocks(model, name, kept)
    return structure.of_blocks(name, kept), kept, renamed(masks, name, kept)


def _scores(
    model: Any, windows: Tensor, structure: Structure, counts: UnitCounts, how: How
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What is known before the walk: of units, and of the stream's channels."""
    if how.importance == "taylor":
        return taylor(model, how.prober.texts(model, windows), structure)
    if how.importance == "kl":
        whole = vars(UnitCounts.of(structure))
        kinds = tuple(kind for kind in ("heads", "neurons") if getattr(counts, kind) < whole[kind])
        few = windows[: how.prober.windows_for(model, how.kl_windows, windows.shape[1])]
        return kl(model, how.prober.texts(model, few), structure, kinds), None
    return {}, None


@torch.no_grad()
def _check(masked: Any, smaller: Any, windows: Tensor) -> None:
    """Refuse a result that computes something else than the model with zeros in the place of what went."""
    ids = windows[:1, :_CHECK_TOKENS]
    wanted, found = masked(input_ids=ids)[0], smaller(input_ids=ids)[0]
    difference = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-30))
    if not difference < _CLOSE:
        raise UserError(
            f"prune_structured: model_type '{masked.config.model_type}' computes something else once units "
            f"are taken out (by {difference:.1g}); its parts are not understood, take student instead"
        )
