"""What a request cost: tokens, calls of the model, guesses of the draft, seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from time import perf_counter


@dataclass
class Counts:
    """Sums over the texts of one request. Seconds are wall-clock time inside the runtimes and the choice
    of tokens; loading, and what the caller does between tokens, are left out."""

    prompt_tokens: int = 0
    tokens: int = 0  # new ones; the first of a text comes with its prompt
    decoded: int = 0  # new ones after the first
    calls: int = 0  # that decoded them: of the model, or of the target where there is a draft
    drafted: int = 0
    accepted: int = 0  # of the drafted
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding alone."""
        return self.decoded / self.decode_seconds if self.decode_seconds else None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that the target kept."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_call(self) -> float | None:
        """Decoded tokens per call; texts that share a call count each."""
        return self.decoded / self.calls if self.calls else None

    def __add__(self, other: "Counts") -> "Counts":
        """Sums of each."""
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The time inside goes into reading prompts."""
        start = perf_counter()
        yield
        self.prefill_seconds += perf_counter() - start

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The time inside goes into decoding."""
        start = perf_counter()
        yield
        self.decode_seconds += perf_counter() - start
