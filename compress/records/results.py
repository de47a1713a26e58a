"""What was measured: a line of `results.jsonl` per variant and runtime, and one per step of a chain.

Written by `measure`, read by `report`.
"""

from pathlib import Path
from typing import Any

from pydantic import Field

from compress.errors import UserError
from compress.host.files import RECORDS_BYTES, read_text
from compress.records.base import Interval, Record, first_fault, write_whole


class EncoderLatency(Record):
    """How long an encoder takes for so many texts at once.

    Attributes:
        length: tokens of each text; None: as long as the labelled examples are, one after the other.
        texts_per_second: by the median; tokens without those that fill a batch.
    """

    batch: int
    length: int | None
    seconds_p50: float | None = None
    seconds_p95: float | None = None
    texts_per_second: float | None = None
    tokens_per_second: float | None = None
    repetitions: int


class Result(Record):
    """One line of `results.jsonl`: one variant in one runtime."""

    variant: str
    runtime: str
    device: str
    artifact: str
    disk_bytes: int | None = None
    weight_bytes: int | None = None
    parameters: int | None = None
    nonzero_parameters: int | None = None
    peak_rss_bytes: int | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    nll: float | None = None
    nll_ci95: Interval | None = None
    delta_nll: float | None = None
    delta_nll_ci95: Interval | None = None
    kl_to_base: float | None = None
    kl_ci95: Interval | None = None
    top1_agreement: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    prefill_seconds_p50: float | None = None
    prefill_seconds_p95: float | None = None
    decode_seconds_p50: float | None = None
    decode_seconds_p95: float | None = None
    decode_seconds_p99: float | None = None
    load_seconds: float | None = None
    protocol: dict[str, Any] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    fingerprint: str = ""
    # of models that embed text; all others leave them null
    cosine_distance: float | None = None
    cosine_ci95: Interval | None = None
    # of models that are judged by labels: what the score is called, the score and its difference to the
    # base's, other metrics by their names, shares of decisions that are not the base's
    score_name: str | None = None
    score: float | None = None
    score_ci95: Interval | None = None
    delta_score: float | None = None
    delta_score_ci95: Interval | None = None
    metrics: dict[str, float] | None = None
    flips: float | None = None
    flips_lost: float | None = None
    flips_gained: float | None = None
    # of timing: medians of each turn (those of one `timing_session` alternate, and compare pairwise), and the
    # share of the cores that other programs had meanwhile
    prefill_round_seconds: tuple[float, ...] = ()
    decode_round_seconds: tuple[float, ...] = ()
    timing_session: str = ""
    busy_share: float | None = None
    # of encoders, by batch and length; those that were not timed are in the protocol
    encoder_latency: tuple[EncoderLatency, ...] = ()


class StepResult(Record):
    """Quality and size after one step of a chain, measured in torch on the saved step."""

    variant: str
    step_index: int
    pass_name: str
    nll: float | None = None
    delta_nll: float | None = None
    delta_nll_ci95: Interval | None = None
    kl_to_base: float | None = None
    kl_ci95: Interval | None = None
    score: float | None = None
    delta_score: float | None = None
    delta_score_ci95: Interval | None = None
    weight_bytes: int | None = None
    file_bytes: int | None = None


def read_results(path: Path) -> list[Result]:
    """All lines of a `results.jsonl`; an absent file has none. Raises UserError for a broken line."""
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(read_text(path, RECORDS_BYTES).split("\n"), start=1):
        if not line:
            continue
        try:
            results.append(Result.of_json(line))
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: no result line of this version ({first_fault(error)}); delete the file "
                "and measure again"
            ) from None
    return results


def write_results(path: Path, results: list[Result]) -> None:
    """Write a whole `results.jsonl`; raises UserError as `Record.as_json`."""
    write_whole(path, "".join(result.as_json(path) + "\n" for result in results))
