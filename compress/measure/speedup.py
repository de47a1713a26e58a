"""How much faster a draft makes its target: the same prompts with and without it, taking turns.

The target is loaded twice: beside a draft it shares the cores, which makes it a bit slower than one that
has them alone, and what drafting is compared with is that. Every prompt of every round is continued with
the draft and without it, who is first changing each time, so that a drifting machine hits both alike. The
speed-up is the ratio of the sums of seconds (prompts are read in them, too, as a user waits for both); its
interval is a bootstrap over prompts. What is written must not differ when greedy, and is compared.
Cost: 2 * rounds continuations of each prompt, and one of each kind to warm up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import UserError
from compress.generation.counts import Counts
from compress.generation.generator import TextGenerator
from compress.generation.sampling import Sampling
from compress.measure.statistics import mean_interval
from compress.records.base import Interval


@dataclass(frozen=True)
class Speedup:
    """`speedup`: seconds without the draft over seconds with it. `same_text`: share of prompts continued by
    the same text both ways; None when sampled. The others as in `Counts`."""

    speedup: float
    speedup_ci95: Interval | None
    plain_tokens_per_second: float | None
    draft_tokens_per_second: float | None
    acceptance: float | None
    tokens_per_call: float | None
    tokens: int
    same_text: float | None


def measure_speedup(
    target: Path | str,
    draft: Path | str,
    prompts: Sequence[str],
    *,
    tokens: int = 128,
    draft_tokens: int = 4,
    rounds: int = 3,
    sampling: Sampling | None = None,
    threads: int | None = None,
) -> Speedup:
    """Continue each prompt by at most `tokens` tokens, `rounds` times with the draft and without.

    Raises:
        UserError: no prompts, or as `TextGenerator` and its `stream`.
    """
    if not prompts or rounds < 1:
        raise UserError(f"prompts: {len(prompts)} in {rounds} rounds measure nothing; give one at least")
    sampling = sampling or Sampling()
    drafting = TextGenerator(target, draft=draft, draft_tokens=draft_tokens, threads=threads)
    ways = {"plain": TextGenerator(target, threads=threads), "draft": drafting}
    seconds = {name: [0.0] * len(prompts) for name in ways}
    totals = {name: Counts() for name in ways}
    same = 0
    for way in ways.values():
        list(way.stream(prompts[0], tokens, sampling))
    for number in range(rounds):
        for index, prompt in enumerate(prompts):
            written = {}
            for name in ("plain", "draft") if (number + index) % 2 else ("draft", "plain"):
                written[name] = "".join(ways[name].stream(prompt, tokens, sampling))
                counts = ways[name].counts
                seconds[name][index] += counts.prefill_seconds + counts.decode_seconds
                totals[name] += counts
            same += written["plain"] == written["draft"]
    return Speedup(
        speedup=sum(seconds["plain"]) / sum(seconds["draft"]),
        speedup_ci95=mean_interval(seconds["plain"], seconds["draft"]),
        plain_tokens_per_second=totals["plain"].tokens_per_second,
        draft_tokens_per_second=totals["draft"].tokens_per_second,
        acceptance=totals["draft"].acceptance,
        tokens_per_call=totals["draft"].tokens_per_call,
        tokens=totals["draft"].tokens,
        same_text=same / (rounds * len(prompts)) if sampling.temperature == 0 else None,
    )
