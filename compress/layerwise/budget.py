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
_TRIES = 32  # of single changes, where a file is not filled after all
_ROUNDS = 12  # of a knapsack whose files do not add up
_NEAR, _VERY_NEAR = 400, 1000  # such a part below the budget is near enough; and if the next try may gain

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
        best, allowed = self.smallest, budget - reserve
        least = self.least(total, budget, reserve)
        # the most bytes of members that are known to fit, the fewest that are known not to
        low, high = self.total(best), self.total([row.index(max(row)) for row in self.costs]) + 1
        room = min(allowed - least + low, high - 1)
        for _ in range(_ROUNDS):
            found = choose(self.costs, losses, room)
            size, cost = total(self.plan(found)), self.total(found)
            following = cost + allowed - size  # if the next plan's file adds as much
            if size <= allowed:
                best, low = found, room
                near = size >= allowed - allowed // _NEAR
                gains = following - room > allowed // _VERY_NEAR
                if following == room or size >= allowed - allowed // _VERY_NEAR or (near and not gains):
                    break
            else:
                high = cost
            if high - low <= 1:
                break
            room = following if low < following < high else (low + high) // 2
        return self._filled(best, losses, total, allowed)

    def _filled(
        self, chosen: Chosen, losses: list[list[float]], total: Callable[[Assignment], int], allowed: int
    ) -> Chosen:
        """A choice that is not near its bytes, with single sets changed to what loses less, where it fits.

        In files of some hundred kilobytes, what is merged and padded moves more bytes than a set may cost.
        """
        size, tries = total(self.plan(chosen)), _TRIES
        gains = sorted(
            (row[k] - row[chosen[i]], i, k)
            for i, row in enumerate(losses)
            for k in range(len(row))
            if row[k] < row[chosen[i]]
        )
        for _, i, k in gains:
            near = size >= allowed - allowed // _NEAR
            more = self.costs[i][k] - self.costs[i][chosen[i]]
            if near or not tries or more > 2 * (allowed - size) or losses[i][k] >= losses[i][chosen[i]]:
                continue
            tries -= 1
            changed = [*chosen[:i], k, *chosen[i + 1 :]]
            if (found := total(self.plan(changed))) <= allowed:
                chosen, size = changed, found
        return chosen

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
