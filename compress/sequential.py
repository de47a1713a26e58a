"""Quantize linear layers in the order in which they run, each making good what was lost before it.

Per group of layers with the same input, through the layers already quantized:
    1. the target moves part of the way to what the original model computed (solvers/asymmetric.py), the
       share chosen on calibration windows kept apart for that;
    2. a grid is fitted by clip search, weighted by the inputs' second moments (formats/integer.py);
    3. GPTQ rounds column by column (solvers/gptq.py);
    4. scales are refitted and codes chosen again, in turn (solvers/refit.py).
The passes that use this differ in who chooses the formats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.calibration import BlockStore, Visit, walk
from compress.formats import Grid, IntegerFormat, QuantizedTensor
from compress.formats.integer import float16_exact
from compress.formats.swap import matrix, put_codes
from compress.moments import Covariance
from compress.solvers.asymmetric import correction, heldout_share, wanted
from compress.solvers.gptq import Factor, factorise, gptq, output_error
from compress.solvers.refit import refine
from compress.training.forward import Precision

# Elements of the rows that are solved together: 32 MB each copy.
_SLICE = 1 << 23


class LayerSolver(BaseModel):
    """How one layer is solved: the fields that all sequential quantizers share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asymmetric: Annotated[float, Field(ge=0, le=1)] | Literal["heldout"] = Field(
        0.5,
        description="share of the way to the asymmetric target; `heldout`: chosen per layer; 0: plain GPTQ",
    )
    residual: bool = Field(
        True, description="the target of layers that end a sublayer makes good the stream's drift, too"
    )
    heldout_windows: int = Field(4, ge=1, description="of the calibration windows, for `heldout`")
    refine: int = Field(
        2, ge=0, le=20, description="rounds of refitted scales and coordinate descent after GPTQ"
    )
    damping: float = Field(0.01, gt=0, le=1, description="added to H, relative to its mean diagonal")
    batch: int = Field(4, ge=1, le=1024, description="calibration windows per forward pass")


def quantize_sequentially(
    model: Any,
    windows: Tensor,
    formats: Mapping[str, IntegerFormat],
    solver: LayerSolver,
    *,
    masks: Mapping[str, Tensor] | None = None,
    precision: Precision = "float32",
    store: BlockStore | None = None,
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
        store: where blocks are while they are not visited; None: in memory.
        what: the label of the progress bar.

    Returns:
        Notes: `mean_output_error` and `worst_output_error` (relative, per layer, solvers/gptq.py),
        `mean_share` of the asymmetric target, `raised_damping` of layers that needed more.

    Raises:
        UserError: a layer outside the blocks, or statistics that cannot be factorised.
    """
    run = _Run(model, formats, solver, masks or {})
    heldout = min(solver.heldout_windows, len(windows) - 1) if solver.asymmetric == "heldout" else 0
    for visit in walk(
        model,
        windows,
        list(formats),
        both_streams=solver.asymmetric != 0,
        heldout=heldout,
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
        formats: Mapping[str, IntegerFormat],
        solver: LayerSolver,
        masks: Mapping[str, Tensor],
    ) -> None:
        self.model, self.formats, self.solver, self.masks = model, formats, solver, masks
        self.errors: dict[str, float] = {}
        self.shares: list[float] = []
        self.raised: dict[str, float] = {}

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
        target = torch.cat(weights)
        texts = [visit.covariance] if visit.heldout is None else [visit.covariance, visit.heldout]
        sums = [self._sums(target, text) for text in texts]
        visit.covariance, visit.heldout = Covariance(1, sums[0].hessian), None
        del texts
        share = self._share(sums)
        hessian, aim = self._means(sums)
        factor = factorise(hessian, self.solver.damping)
        if factor.damping > self.solver.damping:
            self.raised[visit.names[0]] = factor.damping
        if aim is not None:
            target += correction(aim, factor).mul_(share)
            self.shares.append(share)
        del aim
        targets = dict(zip(visit.names, target.split([len(weight) for weight in weights]), strict=True))
        del weights, target
        for format in dict.fromkeys(self.formats[name] for name in visit.names):
            names = [name for name in visit.names if self.formats[name] == format]
            self._solve(names, format, [targets.pop(name) for name in names], hessian, factor)

    def _sums(self, weight: Tensor, seen: Covariance) -> "_Sums":
        aim = None
        if seen.drift is not None:
            aim = wanted(weight, seen.drift, seen.residual if self.solver.residual else None)
        return _Sums(seen.count, seen.hessian, aim)

    def _share(self, sums: list["_Sums"]) -> float:
        """Of the step towards the asymmetric target; chosen on the second text if there is one."""
        if self.solver.asymmetric != "heldout":
            return self.solver.asymmetric
        fitted, apart = sums
        assert fitted.aim is not None
        assert apart.aim is not None
        own = factorise(fitted.hessian / fitted.count, self.solver.damping)
        return heldout_share(apart.aim, correction(fitted.aim / fitted.count, own), apart.hessian)

    @staticmethod
    def _means(sums: list["_Sums"]) -> tuple[Tensor, Tensor | None]:
        """H and W D + R over all texts, in the memory of the first."""
        first, *others = sums
        count = sum(part.count for part in sums)
        for other in others:
            first.hessian.add_(other.hessian)
            if first.aim is not None and other.aim is not None:
                first.aim.add_(other.aim)
        return first.hessian.div_(count), None if first.aim is None else first.aim.div_(count)

    def _solve(
        self,
        names: list[str],
        format: IntegerFormat,
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
        grid = format.fit(target, hessian.diagonal())
        together = max(1, _SLICE // columns)  # rows are independent of each other
        with factor.damped(hessian) as damped:
            for start in range(0, len(target), together):
                rows = slice(start, start + together)
                kept = None if mask is None else mask[rows]
                part = Grid(grid.scales[rows], grid.zeros[rows])
                # values take the place of what they stand for
                target[rows], grid.scales[rows] = self._round(
                    target[rows], format, part, damped, factor, kept
                )
        parts = zip(
            names, target.split(lengths), grid.scales.split(lengths), grid.zeros.split(lengths), strict=True
        )
        for name, new, scales, zeros in parts:
            part, old = Grid(scales, zeros), matrix(self.model.get_submodule(name))
            put_codes(self.model, name, QuantizedTensor.from_codes(format, format.codes(new, part), part))
            self.errors[name] = output_error(old, new, hessian)

    def _round(
        self,
        target: Tensor,
        format: IntegerFormat,
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


@dataclass(frozen=True)
class _Sums:
    """Over `count` rows of a text: H and, if asked for, W D + R (solvers/asymmetric.py)."""

    count: int
    hessian: Tensor
    aim: Tensor | None


def _stacked_masks(names: list[str], weights: list[Tensor], masks: Mapping[str, Tensor]) -> Tensor | None:
    if not any(name in masks for name in names):
        return None
    parts = [
        masks[name] if name in masks else torch.ones_like(weight, dtype=torch.bool)
        for name, weight in zip(names, weights, strict=True)
    ]
    return torch.cat(parts)
