"""What `compress-lm generate` prints: the text as it comes, and on request what it cost."""

import re
import sys
from collections.abc import Iterable, Sequence

from compress.generation.counts import Counts
from compress.generation.generator import Prompt, TextGenerator
from compress.generation.sampling import Sampling

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def print_texts(
    generator: TextGenerator,
    prompts: Sequence[Prompt],
    tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    batch: int,
) -> None:
    """Each prompt and its continuation, or a reply alone, to standard output; a blank line between texts.

    One text is printed as it comes, several when all are written.
    """
    texts: Iterable[Iterable[str]]
    if len(prompts) == 1:
        texts = [generator.stream(prompts[0], tokens, sampling, stop)]
    else:
        texts = [[text] for text in generator.generate(prompts, tokens, sampling, stop, batch)]
    # what can be refused has been, before anything is printed
    for number, (prompt, pieces) in enumerate(zip(prompts, texts, strict=True)):
        shown = prompt if isinstance(prompt, str) and generator.continues else ""
        print("\n" * (number > 0), _harmless(shown), sep="", end="", flush=True)
        for piece in pieces:
            print(_harmless(piece), end="", flush=True)
        print()


def _harmless(text: str) -> str:
    """For a terminal, without what would move its cursor, change its colours or rename its window."""
    return _CONTROLS.sub("", text) if sys.stdout.isatty() else text


def print_counts(counts: Counts) -> None:
    """One line on standard error."""
    parts = [
        f"prompt {counts.prompt_tokens} tokens in {counts.prefill_seconds:.2f} s",
        f"{counts.tokens} new tokens",
    ]
    if counts.tokens_per_second is not None:
        parts.append(f"{counts.tokens_per_second:.1f} tokens/s")
    if counts.acceptance is not None:
        parts.append(f"{counts.acceptance:.0%} of {counts.drafted} drafted tokens accepted")
    if counts.tokens_per_call is not None:
        parts.append(f"{counts.tokens_per_call:.2f} tokens per call")
    print("; ".join(parts), file=sys.stderr)
