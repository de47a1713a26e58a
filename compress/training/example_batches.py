"""Which examples make up a step: a pure function of (seed, step).

An epoch takes every example once, in an order of its own; with `weights` it takes as many, drawn with these
shares. Of a few batches at a time examples of like length come together, so that little is padded; what is
padded, on the right, the mask says. Texts may be changed anew in every epoch (augmentation.py). Nothing is
remembered between steps.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.tasks.base import UNKNOWN, Example
from compress.text.examples import BY_TOKEN, Examples
from compress.training.augmentation import Augmented
from compress.training.batches import MicroBatch

PER_TOKEN = ("tags", *BY_TOKEN)  # kinds that have a target for each token
_POOL = 16  # batches whose examples are sorted together


@dataclass(frozen=True)
class ExampleBatches:
    """Examples of a training.

    Attributes:
        examples: to learn from.
        size: of them per step, over all micro-batches and processes.
        seed: of the order.
        padding: the token that fills rows.
        shares: how often each is drawn, (examples,), summing to 1; None: each once in an epoch.
        augmented: changes texts; None: they stay as they are.
    """

    examples: Examples
    size: int
    seed: int
    padding: int
    shares: NDArray[np.float64] | None = field(default=None, repr=False)
    augmented: Augmented | None = field(default=None, repr=False)

    @property
    def windows(self) -> int:
        """Examples per epoch."""
        return len(self.examples)

    @property
    def batch(self) -> int:
        """Of them per step; all where there are fewer."""
        return min(self.size, self.windows)

    @cached_property
    def step_tokens(self) -> int:
        """Tokens of a step, on average."""
        return max(1, round(self.batch * self.examples.size / self.windows))

    def check(self) -> "ExampleBatches":
        """Itself; raises UserError where there is none."""
        if not self.windows:
            raise UserError(
                "labelled: no row is left to train on; give more, or smaller shares for the others"
            )
        return self

    def identity(self, facts: list[Any]) -> str:
        """SHA-256 over JSON values, the examples and their order."""
        shares = None if self.shares is None else hashlib.sha256(self.shares.tobytes()).hexdigest()
        values = [facts, self.examples.sha256, self.size, self.seed, self.padding, shares]
        values += [] if self.augmented is None else [self.augmented.identity]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def numbers(self, step: int) -> NDArray[np.int64]:
        """The examples of a step, (batch,); fewer at the end of an epoch."""
        epoch, index = self._place(step)
        return self._epoch(epoch)[index]

    def items(self, step: int, numbers: NDArray[np.int64]) -> list[Example]:
        """Examples as a step has them."""
        epoch, _ = self._place(step)
        if self.augmented is not None and self._kept.get("changed_in") != epoch:
            self._kept.update(changed_in=epoch, changed=self.augmented.changed(epoch))
        changed = self._kept.get("changed", {})
        return [changed.get(number) or self.examples[number] for number in numbers.tolist()]

    def micro_batches(self, step: int, parts: int, rank: int = 0, count: int = 1) -> Iterator[MicroBatch]:
        """What process `rank` of `count` computes in a step: at most `parts`, equal but for the last."""
        step_numbers = self.numbers(step)
        numbers = step_numbers[rank::count]
        if not len(numbers):  # the last of an epoch, too few for all: its own weigh nothing
            yield self._rows(step, step_numbers[:1], 0.0, True)
            return
        size, whole = -(-len(numbers) // parts), max(1, self._asked(step, step_numbers))
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            yield self._rows(step, part, self._asked(step, part) / whole, start + size >= len(numbers))

    def _asked(self, step: int, numbers: NDArray[np.int64]) -> int:
        """What a mean loss is over: target tokens where each has its own, else examples."""
        if self.examples.kind not in PER_TOKEN:
            return len(numbers)
        return sum(int((item.targets != UNKNOWN).sum()) for item in self.items(step, numbers))

    def _rows(self, step: int, numbers: NDArray[np.int64], share: float, last: bool) -> MicroBatch:
        items = self.items(step, numbers)
        ids, mask, types = padded(items, self.padding)
        more = {"attention_mask": mask, "targets": padded_targets(items, ids.shape[1], self.examples.kind)}
        if types is not None:
            more["token_type_ids"] = types
        return MicroBatch(ids, numbers, share, last, more)

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its number in that."""
        return divmod(step, -(-self.windows // self.batch))

    def _epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch."""
        if self._kept.get("epoch") != epoch:
            self._kept.update(epoch=epoch, batches=self._cut(epoch))
        return self._kept["batches"]

    @cached_property
    def _kept(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return np.array([len(item.ids) for item in self.examples.items])

    def _cut(self, epoch: int) -> list[NDArray[np.int64]]:
        draw = np.random.default_rng([self.seed, epoch])
        if self.shares is None:
            order = draw.permutation(self.windows)
        else:
            order = draw.choice(self.windows, self.windows, p=self.shares)
        batches: list[NDArray[np.int64]] = []
        pool = self.batch * _POOL
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            batches += [part[i : i + self.batch] for i in range(0, len(part), self.batch)]
        return [batches[i] for i in draw.permutation(len(batches))]


def padded(
    items: list[Example], padding: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]:
    """Ids, mask and types (examples, longest), padded on the right; None for types that none has."""
    longest = max(len(item.ids) for item in items)
    ids = np.full((len(items), longest), padding, dtype=np.int64)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)], mask[row, : len(item.ids)] = item.ids, 1
        if item.types is not None:
            types[row, : len(item.types)] = item.types
    return ids, mask, types if any(item.types is not None for item in items) else None


def padded_targets(items: list[Example], longest: int, kind: str) -> NDArray[Any]:
    """Targets of examples of a kind as an array (examples, width): those of tokens padded with UNKNOWN, to
    `longest`, or where they are texts to the longest of these."""
    if kind not in PER_TOKEN:
        return np.stack([item.targets for item in items])
    if kind == "text":
        longest = max(len(item.targets) for item in items)
    found = np.full((len(items), longest), UNKNOWN, dtype=np.int64)
    for row, item in enumerate(items):
        found[row, : len(item.targets)] = item.targets
    return found
