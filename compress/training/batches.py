"""Which windows of the training text make up a step: a pure function of (seed, step).

The stream is cut into windows of `window` inputs, each predicting the token after it. An epoch visits
every window once, in an order of its own and, if `moving`, from an offset of its own, so that a second epoch
cuts the text elsewhere. Where every text of the model begins with a token, every window does: it is the first
input, and is not predicted. Nothing is remembered between steps: resuming needs the step's number only.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError


class MicroBatch(NamedTuple):
    """The windows of a step that a process computes at once.

    Attributes:
        rows: int64 (windows, window + 1): inputs and, one to the right, targets.
        numbers: which windows of the text those are, (windows,).
        share: of the step's windows, over all processes: what their mean loss weighs.
        last: whether the process's part of the step ends with it.
    """

    rows: NDArray[np.int64]
    numbers: NDArray[np.int64]
    share: float
    last: bool


class Batches(NamedTuple):
    """The windows of a stream of tokens.

    Attributes:
        stream: int32 (tokens,).
        window: inputs per window.
        batch: windows per step, over all micro-batches and processes.
        seed: of the order.
        moving: whether every epoch cuts the text elsewhere.
        begin: tokens that every window begins with.
    """

    stream: NDArray[np.int32]
    window: int
    batch: int
    seed: int
    moving: bool = True
    begin: tuple[int, ...] = ()

    @property
    def windows(self) -> int:
        """Windows per epoch: those that fit whatever the epoch's offset."""
        return (len(self.stream) - self.window) // self.window

    def check(self) -> "Batches":
        """Itself; raises UserError when the text does not fill one batch."""
        if self.windows < self.batch:
            need = (self.batch + 1) * self.window
            raise UserError(
                f"batch: {self.batch} windows of {self.window} tokens need {need} tokens of training text, "
                f"there are {len(self.stream)}: give more text, or lower batch, accumulate or window"
            )
        return self

    def __call__(self, step: int) -> NDArray[np.int64]:
        """The tokens of a step, (batch, window + 1): inputs and, one to the right, targets."""
        return np.stack([self._row(*place) for place in self._places(step)]).astype(np.int64)

    def numbers(self, step: int) -> NDArray[np.int64]:
        """Which windows of the text those are, (batch,): the same number is the same tokens if not moving."""
        return np.array([number for _, number in self._places(step)], dtype=np.int64)

    def micro_batches(self, step: int, parts: int, rank: int = 0, count: int = 1) -> Iterator[MicroBatch]:
        """What process `rank` of `count` computes in a step: at most `parts`, equal but for the last."""
        rows, numbers = self(step)[rank::count], self.numbers(step)[rank::count]
        size = -(-len(rows) // parts)
        for start in range(0, len(rows), size):
            end = min(start + size, len(rows))
            share = (end - start) / self.batch
            yield MicroBatch(rows[start:end], numbers[start:end], share, end == len(rows))

    def fixed(self, number: int) -> NDArray[np.int64]:
        """The tokens of a window that does not move, (window + 1,)."""
        return self._row(0, number).astype(np.int64)

    def _places(self, step: int) -> list[tuple[int, int]]:
        """(offset, number) of each window of a step."""
        places = []
        for position in range(step * self.batch, (step + 1) * self.batch):
            epoch, index = divmod(position, self.windows)
            offset, order = _order(self.seed, epoch, self.windows, self.window)
            places.append((offset if self.moving else 0, int(order[index])))
        return places

    def _row(self, offset: int, number: int) -> NDArray[np.int32]:
        start = offset + number * self.window
        text = self.stream[start : start + self.window + 1 - len(self.begin)]
        return np.concatenate([np.array(self.begin, dtype=np.int32), text])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, windows: int, window: int) -> tuple[int, NDArray[np.int64]]:
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(window)), generator.permutation(windows)
