"""How to measure: the settings a recipe may change, and what is recorded beside every number."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.host.machine import usable_cores

WARM_DECODES = 3  # steps before the timed ones in every round
LOGITS_BYTES = 1_000_000_000  # of the base's logits, on disk at a time


class MeasureProtocol(BaseModel):
    """Settings of a measurement. Timings below 30 prefill repetitions or 100 decode steps are not
    offered; a machine too busy for them in the seconds given ends with fewer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill_tokens: int = Field(512, ge=1, description="prompt length; shortened to the model's context")
    repetitions: int = Field(30, ge=30, description="timed prefills of each variant and runtime")
    decode_tokens: int = Field(100, ge=100, description="timed decode steps of each variant and runtime")
    rounds: int = Field(5, ge=1, le=30, description="turns in which the variants are timed, interleaved")
    timing_seconds: float = Field(
        900, gt=0, description="for all timing: what is left after them is left out, but for a first round"
    )
    batch: int = Field(1, ge=1, description="sequences per prefill and decode step")
    encoder_batches: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 8, 32), description="texts at once that encoders are timed with"
    )
    encoder_lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (16, 128, 512), description="tokens of each text; those beyond a model's context are left out"
    )
    encoder_seconds: float = Field(
        180, ge=0, description="of timing_seconds, at most half, for all batches and lengths together"
    )
    answer_tokens: int = Field(
        64, ge=1, le=4096, description="of each text that an encoder-decoder writes of a labelled source, at "
        "most, its end counted"
    )  # fmt: skip
    threads: int | None = Field(None, ge=1, description="CPU threads; default: all cores of this process")
    provider: Literal["cpu", "cuda", "openvino", "coreml"] = Field(
        "cpu", description="what runs ONNX graphs; artifacts in torch are measured on the CPU"
    )
    seed: int = Field(0, ge=0, description="of the bootstrap")

    @property
    def pinned_threads(self) -> int:
        """The number of threads that is used."""
        return self.threads or usable_cores()

    @property
    def prefills_per_round(self) -> int:
        """Timed prefills in one round, rounded up."""
        return -(-self.repetitions // self.rounds)

    @property
    def decodes_per_round(self) -> int:
        """Decode steps in one round, rounded up, with those that warm up."""
        return -(-self.decode_tokens // self.rounds) + WARM_DECODES

    def prompt_tokens(self, context: int) -> int:
        """Prompt length that leaves room for the decode steps in `context` positions."""
        return max(1, min(self.prefill_tokens, context - self.decodes_per_round))

    def record(self, *, windows: int, window: int, text_sha256: str) -> dict[str, Any]:
        """What goes into the `protocol` field and must be equal for a result to count as already measured."""
        return self.model_dump(mode="json") | {
            "threads": self.pinned_threads,
            "windows": windows,
            "window": window,
            "stride": window,
            "normaliser": "predicted tokens; the first token of a window is not predicted",
            "evaluation_sha256": text_sha256,
        }
