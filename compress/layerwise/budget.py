"""What every tensor of a model may become, what that costs, and the choice that keeps to a budget.

The choices are exact knapsacks (solvers/knapsack.py) over losses and bytes that add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import UserError
from compress.formats import Format
from compress.solvers.knapsack import cheapest, choose

Assignment = dict[str, Format]  # module name -> what it becomes
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

    def within_bytes(self, losses: list[list[float]], rest: int, allowed: int) -> Chosen:
        """The least loss in a folder of at most `allowed` bytes, of which `rest` are not the members'.

        Raises:
            UserError: the smallest formats take more.
        """
        least = self.total(self.smallest) + rest
        if least > allowed:
            raise UserError(
                f"budget_bytes {allowed:,} is too small: with the smallest widths the artifact takes "
                f"{least:,}; raise it, or allow fewer bits in widths and embedding_widths"
            )
        return choose(self.costs, losses, allowed - rest)

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
