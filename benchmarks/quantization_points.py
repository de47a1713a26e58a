"""Which tools run with which settings."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Point:
    """One tool with one setting.

    Attributes:
        tool: whose; `workers/TOOL_worker.py` runs it.
        setting: says in words what `settings` says to the worker.
        bits: of the linear layers; a mixture has its mean unknown and gives None.
        group: columns per scale, where the tool has groups.
        settings: for the worker.
        seeds: of the choice of calibration windows.
        variation: shows why a default is what it is; in the table, not in the picture.
        models: wildcard of those that it is for: bytes of one model mean nothing for another.
    """

    tool: str
    setting: str
    bits: int | None
    group: int | None
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    variation: bool = False
    models: str = "*"


def ours(setting: str, bits: int | None, group: int | None, *passes: dict[str, Any], seeds: int = 3) -> Point:
    """A chain of our passes."""
    return Point("ours", setting, bits, group, {"passes": list(passes)}, seeds)


def auto(setting: str, models: str, *more: dict[str, Any], seeds: int = 3, **fields: Any) -> Point:
    """quantize_auto with a goal that fits some models, and passes after it."""
    group = None if fields.get("coded") else 64
    return replace(
        ours(f"auto, {setting}", None, group, {"quantize_auto": fields}, *more, seeds=seeds), models=models
    )


def gptq(bits: int, group: int = 64, **more: Any) -> dict[str, Any]:
    """quantize_gptq; embeddings stay float, as GPTQModel's and AutoRound's do, unless said otherwise."""
    return {"quantize_gptq": {"format": {"kind": f"int{bits}", "group": group}, "embeddings": None} | more}


def rounded(bits: int) -> dict[str, Any]:
    """quantize_round, with clip search."""
    return {"quantize_round": {"format": f"int{bits}", "embeddings": None}}


def variation(setting: str, **fields: Any) -> Point:
    """4 bits with one default of quantize_gptq changed."""
    point = ours(f"4 bits, {setting}", 4, 64, gptq(4, **fields), seeds=1)
    return replace(point, variation=True)


TUNE: dict[str, Any] = {"tune_scales": {}}


def coded(rate: float, **more: Any) -> dict[str, Any]:
    """quantize_gptq with codes that are entropy-coded in the file."""
    return {"quantize_gptq": {"format": {"kind": "coded", "rate": rate}, "embeddings": None} | more}


EIGHT = {"kind": "int8", "group": 64}
FOUR = {"kind": "int4", "group": 64, "symmetric": True}
# as many bytes of linear layers as GPTQModel's and AutoRound's 4 bits, embeddings at 8
WIDTHS: dict[str, Any] = {"bits_per_weight": 5.12, "embedding_widths": [8]}
# the same for 3 bits, embeddings at 6.5
THREE: dict[str, Any] = {"bits_per_weight": 3.993, "coded": True, "embedding_widths": [8]}

POINTS = [
    Point("gptqmodel", "4 bits", 4, 64, {"bits": 4, "group": 64}),
    Point("gptqmodel", "3 bits", 3, 64, {"bits": 3, "group": 64}),
    Point("auto_round", "4 bits, 50 iterations", 4, 64, {"bits": 4, "group": 64, "iters": 50, "lr": 5e-3}),
    Point("auto_round", "3 bits, 50 iterations", 3, 64, {"bits": 3, "group": 64, "iters": 50, "lr": 5e-3}),
    # its default of 200 iterations, an hour and more for 135 M parameters
    Point("auto_round", "4 bits", 4, 64, {"bits": 4, "group": 64}),
    Point("auto_round", "3 bits", 3, 64, {"bits": 3, "group": 64}),
    Point("hqq", "4 bits", 4, 64, {"bits": 4, "group": 64}),
    Point("hqq", "3 bits", 3, 64, {"bits": 3, "group": 64}),
    Point("hqq", "2 bits", 2, 64, {"bits": 2, "group": 64}),
    Point("bitsandbytes", "NF4", 4, 64),
    Point("llama_cpp", "Q8_0", 8, 32, {"type": "Q8_0"}),
    Point("llama_cpp", "Q4_0", 4, 32, {"type": "Q4_0"}),
    Point("llama_cpp", "Q4_K_M", None, None, {"type": "Q4_K_M"}),
    Point("llama_cpp", "Q3_K_M", None, None, {"type": "Q3_K_M"}),
    Point("llama_cpp", "Q2_K", None, None, {"type": "Q2_K"}),
    # with an importance matrix of the same calibration tokens
    *(
        Point("llama_cpp", f"{kind}, imatrix", bits, 32 if bits else None, {"type": kind, "imatrix": True})
        for kind, bits in (("Q4_0", 4), ("IQ4_XS", None), ("Q4_K_M", None), ("Q3_K_M", None), ("Q2_K", None))
    ),
    ours("4 bits, round to nearest", 4, 64, rounded(4), seeds=1),
    ours("2 bits, round to nearest", 2, 64, rounded(2), seeds=1),
    ours("4 bits", 4, 64, gptq(4)),
    ours("3 bits", 3, 64, gptq(3)),
    ours("2 bits", 2, 64, gptq(2)),
    # no more bytes than the groups of 64 above
    ours("coded, 4.3 bits", None, None, coded(4.3)),
    ours("coded, 3.3 bits", None, None, coded(3.3)),
    ours("coded, 2.28 bits", None, None, coded(2.28)),
    # outputs by what they do to the loss: less of it for twice the time
    ours("4 bits, outputs weighed", 4, 64, gptq(4, outputs="fisher")),
    ours("3 bits, outputs weighed", 3, 64, gptq(3, outputs="fisher")),
    ours("2 bits, outputs weighed", 2, 64, gptq(2, outputs="fisher")),
    ours("8 bits group 64, embeddings too", 8, 64, gptq(8, embeddings=EIGHT)),
    # the fastest form in ONNX Runtime, which benchmarks/latency.py times
    ours("4 bits symmetric, embeddings too", 4, 64, gptq(4, format=FOUR, embeddings=FOUR), seeds=1),
    auto("105.5 MB", "SmolLM2-135M*", budget_bytes=105_500_000),
    auto("91.7 MB", "SmolLM2-135M*", budget_bytes=91_700_000),
    auto("4.5 bits per weight", "demo*", bits_per_weight=4.5),
    auto("3.25 bits per weight", "demo*", bits_per_weight=3.25),
    auto("coded, 3.25 bits per weight", "demo*", bits_per_weight=3.25, coded=True),
    auto("coded, 91.7 MB", "SmolLM2-135M*", budget_bytes=91_700_000, coded=True),
    auto("coded, 60 MB", "SmolLM2-135M*", budget_bytes=60_000_000, coded=True),
    auto("4.35 bits", "SmolLM2-135M*", **WIDTHS),
    auto("coded, 3.33 bits", "SmolLM2-135M*", **THREE),
    ours("4 bits, tuned", 4, 64, gptq(4), TUNE),
    ours("3 bits, tuned", 3, 64, gptq(3), TUNE),
    ours("2 bits, tuned", 2, 64, gptq(2), TUNE),
    ours("4 bits, outputs weighed, tuned", 4, 64, gptq(4, outputs="fisher"), TUNE),
    auto("4.35 bits, outputs weighed, tuned", "SmolLM2-135M*", TUNE, outputs="fisher", **WIDTHS),
    auto("coded, 3.33 bits, tuned", "SmolLM2-135M*", TUNE, **THREE),
    variation("no asymmetric target", asymmetric=0),
    variation("its share by held-out text", asymmetric="heldout"),
    variation("its full step", asymmetric=1),
    variation("no residual term", residual=False),
    variation("no refinement", refine=0),
    variation("symmetric", format={"kind": "int4", "group": 64, "symmetric": True}),
    variation("no clip search", format={"kind": "int4", "group": 64, "clip_search": 0}),
]
