"""What every tensor of a model may become, what that costs, and the choice that keeps to a budget.

The choices are exact knapsacks (solvers/knapsack.py) over losses that add up. Bytes of a whole folder do not
add up exactly, since offsets in a header have more or fewer digits: there the budget is lowered by what a
choice was above it until it fits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compress.errors import UserError
from compress.formats import Format
from compress.solvers.knapsack import cheapest, choose

Assignment = dict[str, Format]  # module name -> what it becomes
Chosen = list[int]  # for each set of modules, which of its formats
_REPAIRS = 20


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
        self, losses: list[list[float]], whole: Callable[[Assignment], int], allowed: int, reserved: int
    ) -> Chosen:
        """The least loss in a folder of at most `allowed - reserved` bytes; `whole` tells those of a plan.

        Raises:
            UserError: the smallest formats take more.
        """
        limit, least = allowed - reserved, whole(self.plan(self.smallest))
        if least > limit:
            raise UserError(
                f"budget_bytes {allowed:,} is too small: with the smallest widths the artifact takes "
                f"{least + reserved:,}; raise it, or allow fewer bits in widths and embedding_widths"
            )
        floor = self.total(self.smallest)
        budget = limit - least + floor
        chosen = self.smallest
        for _ in range(_REPAIRS):
            chosen = choose(self.costs, losses, max(budget, floor))
            excess = whole(self.plan(chosen)) - limit
            if excess <= 0:
                break
            budget -= excess
        return chosen

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
