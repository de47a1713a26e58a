"""What a layer should become, from what the walk knows of it: the target that all sequential passes share.

A layer that is reached by changed inputs moves part of the way to what the original model computed there
(solvers/asymmetric.py), before it is rounded or pruned under the second moments of the changed inputs. The
share is given, or chosen per layer on held-out calibration windows.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.calibration.moments import Covariance
from compress.calibration.walk import Visit
from compress.solvers.asymmetric import correction, heldout_share
from compress.solvers.gptq import Factor, factorise


class Correction(BaseModel):
    """The fields that all sequential passes share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asymmetric: Annotated[float, Field(ge=0, le=1)] | Literal["heldout"] = Field(
        0.5,
        description="share of the way to the asymmetric target; `heldout`: chosen per layer; 0: none of it",
    )
    residual: bool = Field(
        True, description="the target of layers that end a sublayer makes good the stream's drift, too"
    )
    heldout_windows: int = Field(4, ge=1, description="of the calibration windows, for `heldout`")
    damping: float = Field(0.01, gt=0, le=1, description="added to H, relative to its mean diagonal")
    batch: int | None = Field(
        None, ge=1, le=1024, description="calibration windows per forward pass; null: about 2048 tokens"
    )

    def heldout(self, windows: Tensor) -> int:
        """How many of the windows are held out, to choose the share on."""
        return min(self.heldout_windows, len(windows) - 1) if self.asymmetric == "heldout" else 0


@dataclass(frozen=True)
class Aim:
    """Of layers with one input: the stacked target (out, in), H, how to factorise it, the share if any."""

    weight: Tensor
    hessian: Tensor
    damping: float
    together: int
    share: float | None

    @cached_property
    def factor(self) -> Factor:
        """Of H; takes in^3, and is made where it is asked for."""
        return factorise(self.hessian, self.damping, self.together)

    @property
    def raised(self) -> float | None:
        """The damping that a factor took, where one was made and the given was too little."""
        made: Factor | None = vars(self).get("factor")
        return made.damping if made is not None and made.damping > self.damping else None


def aim_of(weights: list[Tensor], visit: Visit, settings: Correction, together: int = 1) -> Aim:
    """The target of the layers of a visit, stacked.

    Uses up the statistics: those of a wide layer are larger than the layer, and are freed once used.

    Args:
        weights: of the visited layers, (out, in) each, float32.
        visit: with the moments of their inputs.
        settings: the share, and the damping of H.
        together: columns that the factor's order must not part.
    """
    target = torch.cat(weights)
    texts = [visit.covariance] if visit.heldout is None else [visit.covariance, visit.heldout]
    sums = [_Sums(text.count, text.hessian, text.aim(target)) for text in texts]
    visit.covariance, visit.heldout = Covariance(1, sums[0].hessian), None
    del texts
    share = _share(sums, settings)
    hessian, aim = _means(sums)
    result = Aim(target, hessian, settings.damping, together, None if aim is None else share)
    if aim is not None:
        target += correction(aim, result.factor).mul_(share)
    return result


@dataclass(frozen=True)
class _Sums:
    """Over `count` rows of a text: H and, if asked for, W D + R (solvers/asymmetric.py)."""

    count: int
    hessian: Tensor
    aim: Tensor | None


def _share(sums: list[_Sums], settings: Correction) -> float:
    """Of the step towards the asymmetric target; chosen on the second text if there is one."""
    if settings.asymmetric != "heldout":
        return settings.asymmetric
    fitted, heldout = sums
    assert fitted.aim is not None
    assert heldout.aim is not None
    own = factorise(fitted.hessian / fitted.count, settings.damping)
    return heldout_share(heldout.aim, correction(fitted.aim / fitted.count, own), heldout.hessian)


def _means(sums: list[_Sums]) -> tuple[Tensor, Tensor | None]:
    """H and W D + R over all texts, in the memory of the first."""
    first, *others = sums
    count = sum(part.count for part in sums)
    for other in others:
        first.hessian.add_(other.hessian)
        if first.aim is not None and other.aim is not None:
            first.aim.add_(other.aim)
    return first.hessian.div_(count), None if first.aim is None else first.aim.div_(count)
