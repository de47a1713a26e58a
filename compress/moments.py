"""Second moments of a layer's inputs: all that a layer-wise solver knows of the calibration text.

With x the input in the original model and x~ the input after everything before was compressed:

    hessian   H = E[x~ x~^T]                 (in, in)
    drift     D = E[(x - x~) x~^T]           (in, in), so that E[x x~^T] = H + D
    residual  R = E[(r - r~) x~^T]           (out, in), r the stream that the layer's output is added to

Cost: H is a symmetric product of float32 rows, which BLAS does in half the multiplications of a general
one. D and R are products with a small difference, so bfloat16 factors (where the machine multiplies them
faster) lose nothing that matters: their error is relative to the difference.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_NARROW = 1024


@dataclass(frozen=True)
class Covariance:
    """Sums over `count` rows; `hessian`, `drift` and `residual` as above, the latter two if known."""

    count: int
    hessian: Tensor
    drift: Tensor | None = None
    residual: Tensor | None = None

    def means(self) -> tuple[Tensor, Tensor | None]:
        """(E[x~ x~^T], E[x x~^T] or None)."""
        hessian = self.hessian / self.count
        return hessian, None if self.drift is None else hessian + self.drift / self.count

    def __add__(self, other: "Covariance") -> "Covariance":
        """Of both texts together."""
        both = [(self.drift, other.drift), (self.residual, other.residual)]
        drift, residual = (None if a is None or b is None else a + b for a, b in both)
        return Covariance(self.count + other.count, self.hessian + other.hessian, drift, residual)


def covariance(
    inputs: list[Tensor],
    originals: list[Tensor] | None = None,
    residuals: Iterable[tuple[Tensor, Tensor]] | None = None,
) -> Covariance:
    """The moments of rows, each list one (rows, width) tensor per batch.

    Args:
        inputs: x~.
        originals: x of the same positions; None leaves the drift out.
        residuals: (r, r~) of the same positions; None leaves the residual out.

    >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> covariance([x], [x]).means()[1].tolist()
    [[0.5, 1.0], [1.0, 2.5]]
    """
    hessian = sum_of_batches(gram(x) for x in inputs)
    drift = residual = None
    if originals is not None:
        drift = sum_of_batches(product(x.sub(y), y) for x, y in zip(originals, inputs, strict=True))
    if residuals is not None:
        pairs = zip(residuals, inputs, strict=True)
        residual = sum_of_batches(product(old.sub(new), y) for (old, new), y in pairs)
    return Covariance(sum(len(x) for x in inputs), hessian, drift, residual)


def gram(x: Tensor) -> Tensor:
    """x^T x in float32, (rows, n) -> (n, n)."""
    rows = x.float()
    if rows.device.type != "cpu":
        return rows.T @ rows
    array = rows.numpy()
    # numpy sees that both factors are the same memory and calls the symmetric product; torch does not
    return torch.from_numpy(np.matmul(array.T, array))


def product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right as float32, (rows, m), (rows, n) -> (m, n), multiplied in the type of `right`."""
    # the transposed copy is worth its while where the matrices are narrow
    rows = left.to(right.dtype).T
    return ((rows.contiguous() if len(rows) < _NARROW else rows) @ right).float()


def sum_of_batches(parts: Iterable[Tensor]) -> Tensor:
    """Their sum, added up in place."""
    iterator = iter(parts)
    total = next(iterator)
    for part in iterator:
        total += part
    return total
