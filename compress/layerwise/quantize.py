"""Quantize linear layers in the order in which they run, each making good what was lost before it.

Per group of layers with the same input, through the layers already quantized:
    1. the target moves part of the way to what the original model computed (solvers/asymmetric.py), the
       share chosen on held-out calibration windows;
    2. a grid is fitted by clip search, weighted by the inputs' second moments (formats/integer.py);
    3. GPTQ rounds column by column (solvers/gptq.py);
    4. scales are refitted and codes chosen again, in turn (solvers/refit.py).
Rows are taken for independent, or, where it is known what outputs do to the loss (calibration/fisher.py),
rounded in blocks that make good each other's errors (solvers/output_feedback.py).
The passes that use this differ in who chooses the formats.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.fisher import output_fisher, require_decoder
from compress.calibration.walk import BlockStore, Visit, walk
from compress.errors import about
from compress.formats import Format, Grid, QuantizedTensor
from compress.formats.base import Fitter, float16_exact
from compress.formats.swap import put_codes
from compress.layerwise.target import Correction, aim_of
from compress.models.layers import matrix
from compress.models.running import Precision
from compress.solvers.gptq import Factor, gptq, output_error
from compress.solvers.output_feedback import RowBlock, side_by_side
from compress.solvers.refit import refine

_SLICE = 1 << 21  # elements of the rows that are solved together: 8 MB each copy
_ROWS = 32  # their number is a multiple of it


class LayerSolver(Correction):
    """How one layer is solved: the fields that all sequential quantizers share."""

    refine: int = Field(
        1, ge=0, le=20, description="rounds of refitted scales and coordinate descent after GPTQ"
    )
    outputs: Literal["alike", "fisher"] = Field(
        "alike",
        description="how errors of a layer's outputs count: all alike, or by what they do to a decoder's "
        "loss, which loses less, takes twice as long, and needs the whole model in memory",
    )
    fisher_tokens: int = Field(8192, ge=64, description="calibration tokens to learn that from")

    def check_outputs(self, model: Any) -> None:
        """Refuse a model whose outputs cannot be weighed; it may be on the meta device.

        Raises:
            UserError: names the field.
        """
        if self.outputs == "fisher":
            require_decoder(model)

    def flops_of_outputs(self, parameters: int) -> float:
        """Of weighing them: a forward pass, and a backward one without gradients of weights."""
        return 4.0 * parameters * self.fisher_tokens if self.outputs == "fisher" else 0.0


def quantize_sequentially(
    model: Any,
    windows: Tensor,
    formats: Mapping[str, Format],
    solver: LayerSolver,
    *,
    masks: Mapping[str, Tensor] | None = None,
    precision: Precision = "float32",
    store: BlockStore | None = None,
    seed: int = 0,
    what: str = "quantizing",
) -> dict[str, Any]:
    """Put codes in the place of the linear layers that `formats` names, in place.

    Args:
        model: in float; its layers are changed one after the other.
        windows: calibration token ids (n, length).
        formats: full module name -> what it becomes.
        solver: the settings.
        masks: module name -> bool (out, in); False stays exactly zero.
        precision: what the forward passes compute in.
        store: where blocks are while they are not visited; None: in memory, as outputs that are not alike
            need them.
        seed: of the tokens drawn to weigh outputs.
        what: the label of the progress bar.

    Returns:
        Notes: `mean_output_error` and `worst_output_error` (relative, per layer, solvers/gptq.py),
        `mean_share` of the asymmetric target, `raised_damping` of layers that needed more.

    Raises:
        UserError: a layer outside the blocks, or statistics that cannot be factorised.
    """
    fisher: dict[str, list[Tensor]] = {}
    if solver.outputs == "fisher":
        tokens = solver.fisher_tokens
        fisher = output_fisher(model, windows, list(formats), tokens=tokens, seed=seed, precision=precision)
    run = _Run(model, formats, solver, masks or {}, fisher)
    for visit in walk(
        model,
        windows,
        list(formats),
        both_streams=solver.asymmetric != 0,
        residual=solver.residual,
        heldout=solver.heldout(windows),
        batch=solver.batch,
        precision=precision,
        store=store,
        what=what,
    ):
        run.visit(visit)
        del visit  # its statistics need not lie beside the next ones
    return run.notes()


class _Run:
    """What one walk gathers."""

    def __init__(
        self,
        model: Any,
        formats: Mapping[str, Format],
        solver: LayerSolver,
        masks: Mapping[str, Tensor],
        fisher: dict[str, list[Tensor]],
    ) -> None:
        self.model, self.formats, self.solver, self.masks = model, formats, solver, masks
        self.fisher = fisher
        self.errors: dict[str, float] = {}
        self.shares: list[float] = []
        self.raised: dict[str, float] = {}
        self.fitters = _fitters(model, formats)

    def notes(self) -> dict[str, Any]:
        worst = max(self.errors.items(), key=lambda item: item[1])
        notes = {
            "mean_output_error": sum(self.errors.values()) / len(self.errors),
            "worst_output_error": worst,
            "raised_damping": self.raised,
        }
        if self.shares:
            notes["mean_share"] = sum(self.shares) / len(self.shares)
        return notes

    def visit(self, visit: Visit) -> None:
        """Solve layers that share an input: one factor for all, rows of one format stacked.

        Uses up the statistics: those of a wide layer are larger than the layer, and are freed once used.
        """
        weights = [matrix(self.model.get_submodule(name)) for name in visit.names]
        aim = aim_of(weights, visit, self.solver)
        hessian, factor = aim.hessian, aim.factor
        if factor.damping > self.solver.damping:
            self.raised[visit.names[0]] = factor.damping
        if aim.share is not None:
            self.shares.append(aim.share)
        parts = aim.weight.split([len(weight) for weight in weights])
        targets = dict(zip(visit.names, parts, strict=True))
        del weights, aim, parts
        for format, names in _stacks({name: (self.formats[name], len(targets[name])) for name in targets}):
            self._solve(names, format, [targets.pop(name) for name in names], hessian, factor)

    def _solve(
        self,
        names: list[str],
        format: Format,
        targets: list[Tensor],
        hessian: Tensor,
        factor: Factor,
    ) -> None:
        lengths, columns = [len(part) for part in targets], targets[0].shape[1]
        mask = _stacked_masks(names, targets, self.masks)
        target = torch.cat(targets)
        del targets[:]
        if mask is not None:
            target *= mask
            format = format.keeping_zeros()
        fitter = self.fitters[format.kind]
        with about(names[0]):
            grid = fitter.fit(format, target, hessian.diagonal())
        weighed = [part for name in names for part in self.fisher.pop(name, [])]
        with factor.damped(hessian) as damped:
            for rows, blocks in _row_order(len(target), columns, weighed, format.run):
                kept = None if mask is None else mask[rows]
                part = Grid(grid.scales[rows], grid.zeros[rows])
                values, grid.scales[rows] = self._round(target[rows], format, part, damped, factor, kept)
                if blocks:
                    errors = target[rows].sub_(values).split([len(block.rows) for block in blocks])
                    for block, lost in zip(blocks, errors, strict=True):
                        block.pass_on(target, lost)
                target[rows] = values  # in the place of what they stand for
        parts = zip(
            names, target.split(lengths), grid.scales.split(lengths), grid.zeros.split(lengths), strict=True
        )
        found = []
        for name, new, scales, zeros in parts:
            part, old = Grid(scales, zeros), matrix(self.model.get_submodule(name))
            found.append((format.codes(new, part), scales))
            put_codes(self.model, name, QuantizedTensor.from_codes(format, found[-1][0], part))
            self.errors[name] = output_error(old, new, hessian)
        fitter.spent(format, found)

    def _round(
        self,
        target: Tensor,
        format: Format,
        grid: Grid,
        damped: Tensor,
        factor: Factor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """GPTQ and refinement of some rows: (values, scales)."""
        columns = target.shape[1]
        return refine(
            target,
            gptq(target, factor, format.column_rounder(grid, columns), mask),
            grid.scales,
            damped,
            format.group_width(columns),
            lambda scales: format.column_rounder(Grid(scales, grid.zeros), columns),
            float16_exact,
            mask,
            rounds=self.solver.refine,
        )


def _fitters(model: Any, formats: Mapping[str, Format]) -> dict[str, Fitter]:
    """One per kind of format, for all of its matrices."""
    weights: dict[str, int] = {}
    for name, format in formats.items():
        count = model.get_submodule(name).weight.numel()
        weights[format.kind] = weights.get(format.kind, 0) + count
    return {format.kind: format.fitter(weights[format.kind]) for format in formats.values()}


def _stacks(layers: Mapping[str, tuple[Format, int]]) -> Iterator[tuple[Format, list[str]]]:
    """Layers, (format, rows), that are solved as one matrix: of one format, with runs that stay whole."""
    stacks: dict[tuple[Format, str], list[str]] = {}
    for name, (format, rows) in layers.items():
        alone = rows % format.run
        stacks.setdefault((format, name if alone else ""), []).append(name)
    for (format, _), names in stacks.items():
        yield format, names


def _row_order(
    count: int, columns: int, fisher: Sequence[Tensor], run: int
) -> Iterator[tuple[slice | Tensor, Sequence[RowBlock]]]:
    """Rows to round together, and what of their errors is passed on: of independent rows nothing is.

    Those of a `run` of the format stay together, in their order.
    """
    if fisher:
        for blocks in side_by_side(fisher, run=run if run > 1 else None):
            yield torch.cat([block.rows for block in blocks]), blocks
        return
    multiple = math.lcm(_ROWS, run)
    together = -(-max(1, _SLICE // columns) // multiple) * multiple
    for start in range(0, count, together):
        yield slice(start, start + together), ()


def _stacked_masks(names: list[str], weights: list[Tensor], masks: Mapping[str, Tensor]) -> Tensor | None:
    if not any(name in masks for name in names):
        return None
    parts = [
        masks[name] if name in masks else torch.ones_like(weight, dtype=torch.bool)
        for name, weight in zip(names, weights, strict=True)
    ]
    return torch.cat(parts)
