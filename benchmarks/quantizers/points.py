"""Which tools run with which settings."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Point:
    """One tool with one setting.

    Attributes:
        tool: whose; `quantizers/TOOL_worker.py` runs it.
        setting: says in words what `settings` says to the worker.
        bits: of the linear layers; a mixture has its mean unknown and gives None.
        group: columns per scale, where the tool has groups.
        settings: for the worker.
        seeds: of the choice of calibration windows.
    """

    tool: str
    setting: str
    bits: int | None
    group: int | None
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1


def ours(setting: str, bits: int | None, group: int | None, *passes: dict[str, Any], seeds: int = 3) -> Point:
    """A chain of our passes."""
    return Point("ours", setting, bits, group, {"passes": list(passes)}, seeds)


def gptq(bits: int, group: int = 64, **more: Any) -> dict[str, Any]:
    """quantize_gptq; embeddings stay float, as GPTQModel's and AutoRound's do, unless said otherwise."""
    return {"quantize_gptq": {"format": {"kind": f"int{bits}", "group": group}, "embeddings": None} | more}


def rounded(bits: int) -> dict[str, Any]:
    """quantize_round, with clip search."""
    return {"quantize_round": {"format": f"int{bits}", "embeddings": None}}


TUNE: dict[str, Any] = {"tune_scales": {}}
EIGHT = {"kind": "int8", "group": 64}

POINTS = [
    Point("gptqmodel", "4 bits", 4, 64, {"bits": 4, "group": 64}),
    Point("gptqmodel", "3 bits", 3, 64, {"bits": 3, "group": 64}),
    Point("auto_round", "4 bits, 50 iterations", 4, 64, {"bits": 4, "group": 64, "iters": 50, "lr": 5e-3}),
    Point("auto_round", "3 bits, 50 iterations", 3, 64, {"bits": 3, "group": 64, "iters": 50, "lr": 5e-3}),
    Point("hqq", "4 bits", 4, 64, {"bits": 4, "group": 64}),
    Point("hqq", "3 bits", 3, 64, {"bits": 3, "group": 64}),
    Point("hqq", "2 bits", 2, 64, {"bits": 2, "group": 64}),
    Point("bitsandbytes", "NF4", 4, 64),
    Point("llama_cpp", "Q8_0", 8, 32, {"type": "Q8_0"}),
    Point("llama_cpp", "Q4_0", 4, 32, {"type": "Q4_0"}),
    Point("llama_cpp", "Q4_K_M", None, None, {"type": "Q4_K_M"}),
    Point("llama_cpp", "Q3_K_M", None, None, {"type": "Q3_K_M"}),
    Point("llama_cpp", "Q2_K", None, None, {"type": "Q2_K"}),
    ours("4 bits, round to nearest", 4, 64, rounded(4), seeds=1),
    ours("2 bits, round to nearest", 2, 64, rounded(2), seeds=1),
    ours("4 bits", 4, 64, gptq(4)),
    ours("3 bits", 3, 64, gptq(3)),
    ours("2 bits", 2, 64, gptq(2)),
    ours("8 bits group 64, embeddings too", 8, 64, gptq(8, embeddings=EIGHT)),
    ours("auto, 105.5 MB", None, 64, {"quantize_auto": {"budget_bytes": 105_500_000}}),
    ours("auto, 91.7 MB", None, 64, {"quantize_auto": {"budget_bytes": 91_700_000}}),
    ours("4 bits, tuned", 4, 64, gptq(4), TUNE, seeds=1),
    ours("3 bits, tuned", 3, 64, gptq(3), TUNE, seeds=1),
    ours("2 bits, tuned", 2, 64, gptq(2), TUNE, seeds=1),
]
