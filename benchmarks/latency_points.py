"""Which tools run which weights on how much text."""

from dataclasses import dataclass, field
from typing import Any

from compress import adds_products_in_32_bits

Passes = list[dict[str, Any]]


@dataclass(frozen=True)
class Point:
    """One tool with one kind of weights.

    Attributes:
        tool: `ours`, or whose worker runs it.
        weights: in words.
        runtime: of ours, that runs it.
        settings: for what writes its files.
    """

    tool: str
    weights: str
    runtime: str = ""
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """What the results call the tool."""
        return f"{self.tool}_{self.runtime}" if self.runtime else self.tool

    @property
    def label(self) -> str:
        """What wildcards are over."""
        return f"{self.name}: {self.weights}"


@dataclass(frozen=True)
class Case:
    """One size of work: `batch` rows of `prompt` tokens each."""

    batch: int
    prompt: int


def ours(runtime: str, weights: str, *passes: dict[str, Any]) -> Point:
    """The base with some passes, in one of our runtimes."""
    return Point("ours", weights, runtime, {"passes": list(passes)})


def rounded(format: Any, embeddings: Any = "int8", **export: Any) -> Passes:
    """Codes without calibration: speed does not depend on which codes they are."""
    return [{"quantize_round": {"format": format, "embeddings": embeddings}}, {"export_onnx": export}]


FLOAT: Passes = [{"export_onnx": {}}]
INT8, INT8_TOKEN = rounded("int8"), rounded("int8", int8_form="token", activation_bits=8)
INT8_VNNI = rounded("int8", int8_form="token", processor="vnni")
INT4, INT4_CACHE = rounded("int4"), rounded("int4", cache="int8")
SYMMETRIC = {"kind": "int4", "group": 64, "symmetric": True}
INT4_SYMMETRIC = rounded(SYMMETRIC, SYMMETRIC)

POINTS = [
    ours("torch", "float32", *FLOAT),
    ours("torch", "int8", *INT8),
    ours("torch", "int4", *INT4),
    ours("onnxruntime", "float32", *FLOAT),
    ours("onnxruntime", "int8", *INT8),
    ours("onnxruntime", "int8, activations per token", *INT8_TOKEN),
    *([ours("onnxruntime", "int8, per token for VNNI", *INT8_VNNI)] if adds_products_in_32_bits() else []),
    ours("onnxruntime", "int4", *INT4),
    ours("onnxruntime", "int4, cache int8", *INT4_CACHE),
    ours("onnxruntime", "int4 symmetric, embeddings too", *INT4_SYMMETRIC),
    Point("llama_cpp", "F16", settings={"type": "F16"}),
    Point("llama_cpp", "Q8_0", settings={"type": "Q8_0"}),
    Point("llama_cpp", "Q4_0", settings={"type": "Q4_0"}),
    Point("openvino_genai", "int8", settings={"arguments": ["--weight-format", "int8"]}),
    Point(
        "openvino_genai",
        "int4",
        settings={"arguments": ["--weight-format", "int4", "--group-size", "64", "--ratio", "1.0"]},
    ),
    Point("onnxruntime_genai", "float32", settings={"precision": "fp32", "extra": []}),
    Point(
        "onnxruntime_genai",
        "int4",
        settings={"precision": "int4", "extra": ["block_size=32", "accuracy_level=4", "prune_lm_head=true"]},
    ),
    # the library with the folder that our export wrote
    Point("onnxruntime_genai", "compress int4", settings={"passes": INT4}),
]
CASES = [
    *(Case(1, prompt) for prompt in (32, 512, 1000, 2048)),  # 1000 and the decoded ones: a context of 1024
    *(Case(batch, prompt) for batch in (4, 16) for prompt in (32, 512, 2048)),
]
