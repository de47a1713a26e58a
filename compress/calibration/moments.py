"""Second moments of a layer's inputs: all that a layer-wise solver knows of the calibration text.

With x the input in the original model and x~ the input after everything before was compressed:

    hessian   H = E[x~ x~^T]                 (in, in)
    drift     D = E[(x - x~) x~^T]           (in, in), so that E[x x~^T] = H + D
    residual  R = E[(r - r~) x~^T]           (out, in), r the stream that the layer's output is added to

A solver needs D and R for W D + R alone (solvers/asymmetric.py). Of a layer with fewer outputs than inputs
that is summed directly, which is cheaper than D and smaller:

    wanted    W D + R = E[(W x + r - W x~ - r~) x~^T]    (out, in)

Cost: H is a symmetric product, summed in float32, computed in little more than half the multiplications of
a general one; of bfloat16 rows it is as exact, and twice as fast where the processor multiplies those.
D and R are products with a small difference, so that even sums in bfloat16 lose nothing that matters: their
error is relative to the difference.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.host.float32 import rounded_factors
from compress.solvers.asymmetric import wanted

_PANEL = 192
_ROWS = 1536


@dataclass(frozen=True)
class Covariance:
    """Sums over `count` rows, as above; `hessian`, and what else is known."""

    count: int
    hessian: Tensor
    drift: Tensor | None = None
    residual: Tensor | None = None
    wanted: Tensor | None = None

    def aim(self, weight: Tensor) -> Tensor | None:
        """W D + R of the weights (out, in) that read these inputs; None if D is unknown."""
        if self.wanted is not None or self.drift is None:
            return self.wanted
        return wanted(weight, self.drift, self.residual)


@dataclass(frozen=True)
class Rows:
    """One batch of positions.

    Attributes:
        inputs: x~, (rows, in).
        originals: x of the same positions; None leaves the drift out.
        residual: r - r~ of the same positions, (rows, out); None leaves the residual out.
        wanted: W x + r - W x~ - r~, (rows, out), in the place of both.
    """

    inputs: Tensor
    originals: Tensor | None = None
    residual: Tensor | None = None
    wanted: Tensor | None = None


def covariance(batches: Iterable[Rows]) -> Covariance:
    """The moments of all batches together; every batch is looked at once.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> covariance([Rows(x[:1]), Rows(x[1:])]).hessian.tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    count, hessian, drift, residual, whole = 0, None, None, None, None
    for rows in batches:
        x = rows.inputs
        count += len(x)
        hessian = gram(x, hessian)
        if rows.originals is not None:
            drift = product(rows.originals.sub(x), x, drift)
        if rows.residual is not None:
            residual = product(rows.residual, x, residual)
        if rows.wanted is not None:
            whole = product(rows.wanted, x, whole)
    assert hessian is not None, "no batches"
    return Covariance(count, mirrored(hessian), drift, residual, whole)


def gram(x: Tensor, total: Tensor | None = None) -> Tensor:
    """x^T x in float32, (rows, n) -> (n, n), only what `mirrored` needs: on and below the diagonal.

    Added to `total`, in its memory, if there is one. (BLAS has a product for this, which numpy calls and
    torch does not; but numpy's threads and torch's, each waiting busily for work, hold up one another.)
    """
    rows = x.float()
    n = rows.shape[1]
    result = rows.new_zeros(n, n) if total is None else total
    # no product on the CPU of bfloat16 factors has a float32 result; rounding them again changes nothing
    with rounded_factors(allowed=x.dtype == torch.bfloat16):
        for start in range(0, n, _PANEL):
            panel = slice(start, start + _PANEL)
            result[panel, : panel.stop].addmm_(rows[:, panel].T, rows[:, : panel.stop])
    return result


def mirrored(lower: Tensor) -> Tensor:
    """What `gram` summed (n, n), with the part above the diagonal filled in, in place."""
    for start in range(_PANEL, len(lower), _PANEL):
        panel = slice(start, start + _PANEL)
        lower[:start, panel] = lower[panel, :start].T
    return lower


def product(left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
    """left^T right as float32, (rows, m), (rows, n) -> (m, n), multiplied in the type of `right`.

    Added to `total`, in its memory, if there is one. By panels, since the result of a product in bfloat16 and
    its float32 copy would each be as large as a statistic.
    """
    rows = left.to(right.dtype).T
    result = right.new_zeros(len(rows), right.shape[1], dtype=torch.float32) if total is None else total
    for start in range(0, len(rows), _ROWS):
        result[start : start + _ROWS] += rows[start : start + _ROWS] @ right
    return result
