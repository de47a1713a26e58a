"""What every tensor of a model may become, what that costs, and the choice that keeps to a budget.

The choices are exact knapsacks (solvers/knapsack.py) over losses and bytes that add up; where a file adds
what depends on the plan, the knapsack is solved a few times.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compress.errors import UserError
from compress.formats import Format
from compress.solvers.knapsack import cheapest, choose

Assignment = dict[str, Format]  # module name -> what it becomes
_TRIES = 32  # of single changes
_ROUNDS = 12  # of a knapsack whose files do not add up
_NEAR, _VERY_NEAR = 400, 1000  # such a part below the budget is near enough: after many tries, at once

Chosen = list[int]  # for each set of modules, which of its formats


@dataclass(frozen=True)
class Candidates:
    """Sets of tensors that get one format, what they may become, and the bytes of each.

    Attributes:
        members: module names, per set.
        formats: to choose from, per set.
        costs: bytes of all members, per set and format.
    """

    members: Sequence[list[str]]
    formats: Sequence[tuple[Format, ...]]
    costs: list[list[int]]

    def plan(self, chosen: Chosen) -> Assignment:
        """The format of every member."""
        picked = [formats[k] for formats, k in zip(self.formats, chosen, strict=True)]
        return {name: f for together, f in zip(self.members, picked, strict=True) for name in together}

    def total(self, chosen: Chosen) -> int:
        """Bytes of all members."""
        return sum(row[k] for row, k in zip(self.costs, chosen, strict=True))

    @property
    def smallest(self) -> Chosen:
        """Of every set the least bytes."""
        return [row.index(min(row)) for row in self.costs]

    def within_bits(self, losses: list[list[float]], weights: int, bits: float) -> Chosen:
        """The least loss with so many bits per weight; `losses` per set and format, as `costs`.

        Raises:
            UserError: the smallest formats take more.
        """
        budget = int(bits * weights / 8)
        if self.total(self.smallest) > budget:
            raise UserError(
                f"bits_per_weight {bits:g} is too small: the smallest widths need "
                f"{self.total(self.smallest) * 8 / weights:.3f}; raise it, or allow fewer bits in widths and "
                "embedding_widths"
            )
        return choose(self.costs, losses, budget)

    def within_bytes(
        self, losses: list[list[float]], total: Callable[[Assignment], int], budget: int, reserve: int = 0
    ) -> Chosen:
        """The least loss in files of at most `budget` bytes, of which `reserve` are left.

        `total` weighs all files of a plan. What they have beside the members' bytes may depend on the plan
        (padding, what is merged): it is taken to be as in the plan before, until what is found fits closely.

        Raises:
            UserError: the smallest formats take more.
        """
        self.least(total, budget, reserve)
        return _Filling(self, losses, total, budget - reserve).best()

    def least(self, total: Callable[[Assignment], int], budget: int, reserve: int = 0) -> int:
        """Bytes of all files with the smallest formats.

        Raises:
            UserError: more than `budget`, of which `reserve` are left.
        """
        least = total(self.plan(self.smallest))
        if least > budget - reserve:
            raise UserError(
                f"budget_bytes {budget:,} is too small: with the smallest widths the artifact takes "
                f"{least + reserve:,}; raise it, or allow fewer bits in widths and embedding_widths"
            )
        return least

    def within_loss(self, losses: list[list[float]], largest: float) -> Chosen:
        """The least bytes with a summed loss of at most `largest`.

        Raises:
            UserError: the largest formats lose more.
        """
        least = sum(min(row) for row in losses)
        if least > largest:
            raise UserError(
                f"largest_kl {largest:g} is too small: the largest widths lose {least:.4g}; raise it"
            )
        return cheapest(self.costs, losses, largest)


@dataclass(frozen=True)
class _Filling:
    """The search for a choice whose files fill what is allowed; the smallest formats keep to it."""

    candidates: Candidates
    losses: list[list[float]]
    total: Callable[[Assignment], int]
    allowed: int

    def best(self) -> Chosen:
        """Of what the knapsack finds for several sums of costs, what fits and loses least."""
        costs = self.candidates.costs
        best, over = self.candidates.smallest, None
        # the most bytes of members that are known to fit, and the fewest that are known not to
        low, high = self.candidates.total(best), sum(map(max, costs)) + 1
        room = min(self.allowed - self._size(best) + low, high - 1)
        for _ in range(_ROUNDS):
            found = choose(costs, self.losses, room)
            spare = self.allowed - self._size(found)
            cost = self.candidates.total(found)
            if spare < 0:
                over, high = found, cost
            else:
                best, low = found, room
                if cost + spare == room or spare <= self.allowed // _VERY_NEAR:
                    return best  # bytes add up, or there is nothing to gain
            if high - low <= 1:
                break
            room = cost + spare  # if the files add to the next as much
            if not low < room < high:
                room = (low + high) // 2
        return min(filter(None, (self._raised(best), over and self._lowered(over))), key=self._lost)

    def _raised(self, chosen: Chosen) -> Chosen:
        """Single sets changed to what loses less, the largest gains first, while it fits and is not near.

        In files of some hundred kilobytes, what is merged and padded moves more bytes than a set costs.
        """
        size, tries = self._size(chosen), _TRIES
        for gain, i, k in self._changes(chosen):
            more = self.candidates.costs[i][k] - self.candidates.costs[i][chosen[i]]
            better = gain < 0 and self.losses[i][k] < self.losses[i][chosen[i]]
            if better and tries and more <= 2 * (self.allowed - size) and not self._is_near(size):
                tries -= 1
                changed = [*chosen[:i], k, *chosen[i + 1 :]]
                if (found := self._size(changed)) <= self.allowed:
                    chosen, size = changed, found
        return chosen

    def _lowered(self, chosen: Chosen) -> Chosen | None:
        """One set changed so that what was too large fits, the smallest loss first."""
        smaller = [
            [*chosen[:i], k, *chosen[i + 1 :]]
            for loss, i, k in self._changes(chosen)
            if loss >= 0 and self.candidates.costs[i][k] < self.candidates.costs[i][chosen[i]]
        ]
        return next((c for c in smaller[:_TRIES] if self._size(c) <= self.allowed), None)

    def _changes(self, chosen: Chosen) -> list[tuple[float, int, int]]:
        """What other choices of single sets add to the loss: by it, set and format."""
        return sorted(
            (row[k] - row[chosen[i]], i, k)
            for i, row in enumerate(self.losses)
            for k in range(len(row))
            if k != chosen[i]
        )

    def _size(self, chosen: Chosen) -> int:
        return self.total(self.candidates.plan(chosen))

    def _lost(self, chosen: Chosen) -> float:
        return sum(row[k] for row, k in zip(self.losses, chosen, strict=True))

    def _is_near(self, size: int) -> bool:
        return self.allowed - self.allowed // _NEAR <= size
