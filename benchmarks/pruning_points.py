"""Which tools prune and heal with which settings."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Point:
    """One tool with one setting.

    Attributes:
        tool: whose; `workers/TOOL_worker.py` runs it. `fine_tuning` is plain training on the text.
        setting: says in words what `settings` says to the worker.
        tokens: it is trained on after pruning.
        settings: for the worker.
        structured: the result is smaller and may be faster, so its decoding is timed.
        seeds: of the choice of calibration windows, and of training.
        models: wildcard of those that it is for.
    """

    tool: str
    setting: str
    tokens: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    structured: bool = False
    seeds: int = 1
    models: str = "*"


def ours(setting: str, *passes: dict[str, Any], tokens: int = 0, structured: bool = False) -> Point:
    """A chain of our passes, healed by distillation on so many tokens."""
    heal = [{"distill": HEAL | {"tokens": tokens}}] if tokens else []
    told = f"{setting}, healed {tokens / 1e6:g} M tokens" if tokens else setting
    return Point("ours", told, tokens, {"passes": [*passes, *heal]}, structured)


def fine_tuned(setting: str, *passes: dict[str, Any], tokens: int, structured: bool = False) -> Point:
    """The same start, trained on the text alone: cross-entropy, AdamW."""
    train = {"train": PLAIN | {"tokens": tokens}}
    told = f"{setting}, trained {tokens / 1e6:g} M tokens"
    return Point("fine_tuning", told, tokens, {"passes": [*passes, train]}, structured)


# rates for weights that were trained long: a hundredth of those for a start from nothing
HEAL: dict[str, Any] = {"window": 256, "batch": 4, "muon_learning_rate": 1e-3, "learning_rate": 1e-4}
PLAIN: dict[str, Any] = {"window": 256, "batch": 4, "optimizer": "adamw", "learning_rate": 5e-5}
BUDGETS = (50_000, 100_000, 250_000)
HALF: dict[str, Any] = {"sparsity": 0.5}
PAIRS: dict[str, Any] = {"pattern": "2:4"}
UNSTRUCTURED = {"magnitude": "prune_magnitude", "Wanda": "prune_wanda", "SparseGPT": "prune_sparsegpt",
                "ALPS": "prune_alps"}  # fmt: skip
