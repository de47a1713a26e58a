"""Which windows of the training text make up a step: a pure function of (seed, step).

The stream is cut into windows of `window` inputs, each predicting the token after it. An epoch visits
every window once, in an order of its own and, if `moving`, from an offset of its own, so that a second epoch
cuts the text elsewhere. Where every text of the model begins with a token, every window does: it is the first
input, and is not predicted. A model that reads whole windows (an encoder) gets them as the tokenizer begins
and ends texts, and no token after. Nothing is remembered between steps: resuming needs the step's number
only.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

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
        more: what else belongs to them, by name, each (windows, ...).
    """

    rows: NDArray[np.int64]
    numbers: NDArray[np.int64]
    share: float
    last: bool
    more: Mapping[str, NDArray[Any]] = {}


class Material(Protocol):
    """What a training learns from: windows of text, or examples, in an order of its own."""

    @property
    def windows(self) -> int:
        """Windows, or examples, per epoch."""
        ...

    @property
    def batch(self) -> int:
        """Of them per step, over all micro-batches and processes."""
        ...

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, about."""
        ...

    @property
    def seed(self) -> int:
        """Of the order."""
        ...

    def check(self) -> "Material":
        """Itself; raises UserError where there is too little."""
        ...

    def identity(self, facts: list[Any]) -> str:
        """Digest of what it is made of and its order, and of other facts (JSON values)."""
        ...

    def micro_batches(self, step: int, parts: int, rank: int = 0, count: int = 1) -> Iterator[MicroBatch]:
        """What process `rank` of `count` computes in a step: at most `parts`."""
        ...


class Batches(NamedTuple):
    """The windows of a stream of tokens.

    Attributes:
        stream: int32 (tokens,).
        window: inputs per window.
        batch: windows per step, over all micro-batches and processes.
        seed: of the order.
        moving: whether every epoch cuts the text elsewhere.
        begin: tokens that every window begins with.
        end: tokens that every window ends with, where nothing comes `after`.
        after: tokens after the inputs that a row holds: the last one's target.
    """

    stream: NDArray[np.int32]
    window: int
    batch: int
    seed: int
    moving: bool = True
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    after: int = 1

    @property
    def windows(self) -> int:
        """Windows per epoch: those that fit whatever the epoch's offset."""
        return (len(self.stream) - self.window) // self.window

    @property
    def step_tokens(self) -> int:
        """Inputs of a step."""
        return self.batch * self.window

    def identity(self, facts: list[Any]) -> str:
        """SHA-256 over JSON values, the text and its order."""
        values = [facts, self.window, self.batch, self.seed, self.moving, *self.begin]
        values += [] if self.after else [self.after, *self.end]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.stream).data)
        return digest.hexdigest()

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
        text = self.stream[start : start + self.window + self.after - len(self.begin) - len(self.end)]
        begin, end = (np.array(side, dtype=np.int32) for side in (self.begin, self.end))
        return np.concatenate([begin, text, end])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, windows: int, window: int) -> tuple[int, NDArray[np.int64]]:
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(window)), generator.permutation(windows)
