"""Prefill and decode, timed apart, through the runtime's own protocol.

Method. *Prefill* reads a prompt of `prompt.shape[1]` tokens and computes the logits of its last position.
*Decode* appends one token per row to the key-value cache that such a prefill left, and computes its
logits; the tokens are given (text, not the model's choice), so every variant does the same work, and
sampling is not timed. Each round begins with an untimed prefill and a few untimed decode steps; garbage
collection is off while the clock runs.

The harness keeps one process per variant and gives them rounds in turn, in an order that turns round by
one each time (`round_order`): a machine that gets slower while measuring then slows all variants alike. The
medians of every round are kept, so that two variants compare round by round. All rounds have a budget of
seconds: where it is short, as on a busy machine, there are fewer repetitions.

Tokens per second are those of the median repetition. Percentiles follow `statistics.percentile`: no p95
below 20 samples, no p99 below 100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from compress.host.memory import no_garbage_collection
from compress.measure.statistics import percentile
from compress.runtimes.base import Runtime

T = TypeVar("T")


@dataclass
class Samples:
    """Seconds of every repetition."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def extend(self, other: Samples) -> None:
        """Add the repetitions of another round."""
        self.prefill += other.prefill
        self.decode += other.decode

    @property
    def medians(self) -> tuple[float, float]:
        """Of prefill and of decode, seconds."""
        return float(np.median(self.prefill)), float(np.median(self.decode)) if self.decode else 0.0

    def summary(self, prompt_tokens: int, batch: int) -> dict[str, Any]:
        """The latency fields of a `Result`, as `summarise`."""
        return summarise(self, prompt_tokens, batch)


@dataclass
class Timing:
    """What the processes of one artifact reported of all its rounds.

    Attributes:
        rounds: the repetitions of each.
        together: they were one process, alive beside those of all the others.
        session: the name of the rounds that were taken in turn with these.
        busy: of each round, the share of the cores that other programs had.
        waiting: how threads waited for each other, "spinning" or "sleeping".
        cells: of an encoder, the fields of an `EncoderLatency` for each batch and length.
        cells_left_out: why there are no others.
    """

    rounds: list[Samples] = field(default_factory=list)
    peak_rss_bytes: int | None = None
    load_seconds: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    together: bool = True
    session: str = ""
    busy: list[float] = field(default_factory=list)
    waiting: str = "spinning"
    cells: list[dict[str, Any]] = field(default_factory=list)
    cells_left_out: dict[str, str] = field(default_factory=dict)

    @property
    def samples(self) -> Samples:
        """The repetitions of all rounds."""
        found = Samples()
        for samples in self.rounds:
            found.extend(samples)
        return found

    def summary(self, batch: int) -> dict[str, Any]:
        """The fields of timing in a `Result`."""
        medians = [samples.medians for samples in self.rounds]
        return self.samples.summary(self.prompt_tokens, batch) | {
            "prefill_round_seconds": tuple(prefill for prefill, _ in medians),
            "decode_round_seconds": tuple(decode for _, decode in medians if decode),
            "timing_session": self.session,
            "busy_share": float(np.mean(self.busy)) if self.busy else None,
            "peak_rss_bytes": self.peak_rss_bytes,
            "load_seconds": float(np.median(self.load_seconds)),
            "encoder_latency": tuple(self.cells),
        }


def time_round(
    runtime: Runtime,
    prompt: npt.NDArray[np.int32],
    following: npt.NDArray[np.int32],
    repetitions: int,
    warm_up: int,
    rehearse: bool = True,
    seconds: float = math.inf,
) -> Samples:
    """One round: `repetitions` prefills of `prompt` [batch, P], then one decode per column of `following`
    [batch, D].

    The first `warm_up` columns of `following` are not timed, nor is a prefill before the others, which
    `rehearse` False leaves out: one of a minute needs no rehearsal of a minute. After half of `seconds` there
    is no other prefill, and after all of them no other decode, but for the first of each.
    """
    samples, began = Samples(), perf_counter()
    state = runtime.prefill(prompt) if rehearse else None
    with no_garbage_collection():
        for _ in range(repetitions):
            del state  # freeing the last cache must not be timed
            start = perf_counter()
            state = runtime.prefill(prompt)
            samples.prefill.append(perf_counter() - start)
            if perf_counter() - began > seconds / 2:
                break
        for step, tokens in enumerate(np.ascontiguousarray(following.T)):
            assert state is not None, "neither a rehearsal nor a repetition"
            start = perf_counter()
            state = runtime.decode(state, tokens)
            if step >= warm_up:
                samples.decode.append(perf_counter() - start)
                if perf_counter() - began > seconds:
                    break
    return samples


def summarise(samples: Samples, prompt_tokens: int, batch: int) -> dict[str, Any]:
    """The latency fields of a `Result`; None where there are too few samples for a percentile."""
    prefill, decode = percentile(samples.prefill, 0.5), percentile(samples.decode, 0.5)
    return {
        "prefill_tokens_per_second": None if prefill is None else batch * prompt_tokens / prefill,
        "decode_tokens_per_second": None if decode is None else batch / decode,
        "prefill_seconds_p50": prefill,
        "prefill_seconds_p95": percentile(samples.prefill, 0.95),
        "decode_seconds_p50": decode,
        "decode_seconds_p95": percentile(samples.decode, 0.95),
        "decode_seconds_p99": percentile(samples.decode, 0.99),
    }


def round_order(items: Sequence[T], number: int) -> list[T]:
    """The order of round `number`: everyone is first once before anyone is first twice.

    >>> [round_order("abc", n) for n in range(3)]
    [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b']]
    """
    turn = number % len(items) if items else 0
    return [*items[turn:], *items[:turn]]
