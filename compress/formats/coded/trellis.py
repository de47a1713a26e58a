"""Trellis-coded quantization: codes take turns between two coarse grids, for less error at the same rate.

Steps 0, 1, 2, ... of a fine grid fall into four sets by their remainder of 4. A machine of eight states reads
the codes of a run one after another; each state allows two of the sets, all even steps or all odd ones, and
which of the two was taken decides the next state:

    state       0       1       2       3       4       5       6       7
    set: next   0: 0    1: 2    2: 4    3: 6    2: 0    3: 2    0: 4    1: 6
                2: 1    3: 3    0: 5    1: 7    0: 1    1: 3    2: 5    3: 7

In every state the choice is among steps two apart, so a code costs what one of a grid twice as coarse does.
But a run may go many ways, and the nearest of them is found exactly, by dynamic programming (Viterbi 1967).
The error is about 1 dB less than the coarse grid's own, of the 1.53 dB that separate it from the best that
any quantizer can do; a run starts in state 0, which costs short runs a part of that.

Marcellin, Fischer: Trellis coded quantization of memoryless and Gauss-Markov sources (1990), IEEE Trans.
Communications 38 (1), with the sets of Ungerboeck (1982); entropy-coded: Fischer, Wang (1992). The eight
states are those of JPEG 2000, part 2. For weights with GPTQ's feedback, a run inside each column: QTIP (Tseng
et al. 2024, arXiv 2406.11235) has codes of a fixed number of bits.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RUN = 32  # rows that a run goes through
_STATES, _HALF = 8, 4  # a state t is reached from t // 2 and from t // 2 + 4
# The set that leads to state t from the lower, and from the upper of the two.
_SETS = np.array([[0, 2, 1, 3, 2, 0, 3, 1], [2, 0, 3, 1, 0, 2, 1, 3]])
_TOGETHER = 1 << 15  # runs whose ways are kept at a time


def follow(target: Tensor, weights: Tensor, lowest: int, highest: int) -> Tensor:
    """The allowed steps nearest to `target`, in the sum of squares of every run.

    Args:
        target: float32 (rows, columns), in steps; a run goes down RUN rows of a column.
        weights: of the squares, (rows, 1).
        lowest: of all steps; divides by 4.
        highest: of all steps; 3 more than such a number.

    Returns:
        Whole numbers, float32 (rows, columns), on the device of `target`.
    """
    rows, columns = target.shape
    runs = -(-rows // RUN)
    filled = np.zeros((runs * RUN, columns), np.float32)
    filled[:rows] = target.detach().cpu().numpy()
    weighed = np.zeros((runs * RUN, 1), np.float32)  # what fills the last run up has no weight
    weighed[:rows] = weights.detach().cpu().numpy()
    steps = filled.reshape(runs, RUN, columns).swapaxes(0, 1)
    cost = weighed.reshape(runs, RUN, 1).swapaxes(0, 1)
    chosen = np.empty_like(filled).reshape(runs, RUN, columns)
    together = max(1, _TOGETHER // runs)
    for start in range(0, columns, together):
        part = steps[:, :, start : start + together]
        found = _nearest_way(
            part.reshape(RUN, -1), np.broadcast_to(cost, part.shape).reshape(RUN, -1), lowest, highest
        )
        chosen[:, :, start : start + together] = found.reshape(part.shape).swapaxes(0, 1)
    return torch.from_numpy(chosen.reshape(runs * RUN, columns)[:rows]).to(target.device)


def _nearest_way(
    steps: NDArray[np.float32], weights: NDArray[np.float32], lowest: int, highest: int
) -> NDArray[np.float32]:
    """steps, weights (RUN, runs) -> (RUN, runs)."""
    length, runs = steps.shape
    sets = np.arange(4, dtype=np.float32).reshape(4, 1, 1)
    near = np.rint((steps - sets) * 0.25)
    near = np.clip(near * 4 + sets, lowest + sets, highest - 3 + sets)  # (4, RUN, runs)
    squares = np.square(near - steps) * weights
    # (RUN, 2, 4, 2, runs): by where a way comes from, and where it goes to
    ways = squares[_SETS.ravel()].swapaxes(0, 1).reshape(length, 2, _HALF, 2, runs)
    cost = np.full((_STATES, runs), np.inf, np.float32)
    cost[0] = 0.0
    so_far = cost.reshape(2, _HALF, 1, runs)
    from_lower, from_upper = ways.reshape(length, 2, _STATES, runs).swapaxes(0, 1)
    for both, lower, upper in zip(ways, from_lower, from_upper, strict=True):
        both += so_far
        np.minimum(lower, upper, out=cost)
    # where each state was reached from, as an index into what lies behind it, (RUN, 8 * runs)
    before = np.arange(_STATES, dtype=np.intp)[:, None] // 2 + _HALF * (from_upper < from_lower)
    each = np.arange(runs, dtype=np.intp)
    before *= runs
    before += each
    before = before.reshape(length, -1)
    visited = np.empty((length + 1, runs), np.intp)
    visited[length] = cost.argmin(0) * runs + each
    for i in range(length - 1, -1, -1):
        before[i].take(visited[i + 1], out=visited[i], mode="clip")  # the others write through a copy
    states = visited[1:] // runs
    sets = _SETS[(visited[:-1] >= _HALF * runs).astype(np.intp), states]
    return np.take_along_axis(near, sets[None], 0)[0]


def halved(steps: Tensor) -> Tensor | None:
    """Which of its state's steps each one is: int16 (rows, columns); half the step, rounded down.

    None where the steps do not go through the states as they should.
    """
    state = torch.zeros_like(steps[::RUN])
    for i in range(RUN):
        here = steps[i::RUN]
        state = state[: len(here)]
        if bool(((here ^ state) & 1).any()):
            return None
        state = _next(state, here)
    return steps >> 1


def doubled(halves: Tensor) -> Tensor:
    """Undo `halved`: int16 (rows, columns) -> steps (rows, columns)."""
    result = torch.empty_like(halves)
    state = torch.zeros_like(halves[::RUN])
    for i in range(RUN):
        state = state[: len(halves[i::RUN])]
        here = halves[i::RUN] * 2 + (state & 1)
        result[i::RUN] = here
        state = _next(state, here)
    return result


def _next(state: Tensor, step: Tensor) -> Tensor:
    """Where a step leads: to the second of two by the sets 2 and 3, or by 0 and 1 from states 2 to 5.

    >>> _next(torch.arange(8), torch.tensor([0, 1, 2, 3, 2, 3, 0, 1])).tolist()
    [0, 2, 4, 6, 0, 2, 4, 6]
    """
    second = ((step >> 1) ^ (state >> 1) ^ (state >> 2)) & 1
    return ((state & 3) << 1) + second
