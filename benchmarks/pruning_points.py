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


def unstructured() -> list[Point]:
    """Half of the weights zero, everybody's way, and 2:4."""
    found = []
    for share, goal in (("50 %", HALF), ("2:4", PAIRS)):
        for method in ("sparsegpt", "wanda"):
            settings = {"method": method, "sparsity": 0.5} | goal
            name = {"sparsegpt": "SparseGPT", "wanda": "Wanda"}[method]
            found.append(Point("llmcompressor", f"{name} {share}", settings=settings))
        found += [ours(f"{name} {share}", {step: goal}) for name, step in UNSTRUCTURED.items()]
    found += [
        ours(f"{name} 50 %, {allocation}", {UNSTRUCTURED[name]: HALF | {"allocation": allocation}})
        for name in ("SparseGPT", "ALPS")
        for allocation in ("owl", "kl")
    ]
    found += [
        ours(f"{name} 50 %, no asymmetric target", {UNSTRUCTURED[name]: HALF | {"asymmetric": 0}})
        for name in ("SparseGPT", "ALPS")
    ]
    best, plain = {"prune_alps": HALF}, {"prune_magnitude": HALF}
    found += [ours("ALPS 50 %", best, tokens=tokens) for tokens in BUDGETS]
    found += [fine_tuned("magnitude 50 %", plain, tokens=tokens) for tokens in BUDGETS]
    found += [fine_tuned("ALPS 50 %", best, tokens=BUDGETS[-1])]
    return found


def structured() -> list[Point]:
    """A quarter of the blocks' parameters gone; other shares for the curve."""
    # a third of the neurons of SmolLM2-135M are a quarter of its blocks
    magnitude = {"importance": "magnitude", "neurons": 1 / 3}
    taylor = {"importance": "taylor", "neurons": 1 / 3}
    found = [
        Point("torch_pruning", "25 %, neurons, group magnitude", settings=magnitude, structured=True),
        Point("torch_pruning", "25 %, neurons, group Taylor", settings=taylor, structured=True),
    ]
    for share in (0.9, 0.75, 0.6, 0.5):
        step = {"prune_structured": {"target": {"block_parameters": share}}}
        found.append(ours(f"{100 * (1 - share):.0f} %", step, structured=True))
    quarter: dict[str, Any] = {"prune_structured": {"target": {"block_parameters": 0.75}}}
    neurons: dict[str, Any] = {"prune_structured": {"neurons": 1 / 3}}
    found.append(ours("25 %, neurons", neurons, structured=True))
    found.append(ours("25 %, blocks", {"prune_structured": {"blocks": 0.25}}, structured=True))
    found += [ours("25 %", quarter, tokens=tokens, structured=True) for tokens in BUDGETS]
    found += [fine_tuned("25 %", quarter, tokens=tokens, structured=True) for tokens in BUDGETS[-1:]]
    return found


POINTS = [*unstructured(), *structured()]
