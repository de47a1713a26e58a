"""Which pairs of texts make up a step: as examples are dealt out, two texts to each.

A micro-batch holds the first texts of its pairs, and behind them the second ones, padded together. What is
asked of a pair is told by `targets`: the numbers of its two texts, and its label where it has one.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compress.training.batches import MicroBatch
from compress.training.example_batches import ExampleBatches, padded


@dataclass(frozen=True)
class PairBatches(ExampleBatches):
    """Pairs of a training: `examples` are the texts, each by itself, with their `pairs`."""

    @property
    def windows(self) -> int:
        """Pairs per epoch."""
        return len(self.examples.pairs)

    @cached_property
    def step_tokens(self) -> int:
        """Tokens of a step, on average."""
        return max(1, round(self.batch * self._lengths.sum() / self.windows))

    def _rows(self, step: int, numbers: NDArray[np.int64], share: float, last: bool) -> MicroBatch:
        told = self._told[numbers]
        texts = [self.examples[int(text)] for side in (0, 1) for text in told[:, side]]
        ids, mask, _ = padded(texts, self.padding)
        return MicroBatch(ids, numbers, share, last, {"attention_mask": mask, "targets": told})

    @cached_property
    def _told(self) -> NDArray[np.float64]:
        """(pairs, 2 or 3)."""
        return np.array(self.examples.pairs, dtype=np.float64)

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        """Tokens of both texts."""
        single = np.array([len(item.ids) for item in self.examples.items])
        return single[self._told[:, :2].astype(np.int64)].sum(1)
