"""Several texts at once: each prompt is read alone, then all take their next token in one call.

Decoding waits for the weights, which are read once per call however many texts it serves; reading a prompt
is bound by arithmetic and gains nothing from company. So prompts need no padding: their caches are put side
by side afterwards, each row with its own length, and every text is what it would be alone, up to rounding.
A text that ends makes room for the next prompt at once.
Limits: where a runtime cannot join rows of unlike lengths, one text follows another.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from compress.generation.counts import Counts
from compress.generation.sampling import Chooser
from compress.runtimes.base import State, TextRuntime


def continue_together(
    runtime: TextRuntime,
    prompts: Sequence[Sequence[int]],
    choosers: Sequence[Chooser],
    take: Callable[[int, int], bool],
    ends: Collection[int] = (),
    *,
    batch: int = 8,
    counts: Counts | None = None,
) -> None:
    """Continue all `prompts`, at most `batch` at a time, each until a token of `ends`; `counts` is added to.

    `take(row, token)` is told every token as it comes, and answers whether that text goes on; it says no
    before a text outgrows the model's context.
    """
    counts = Counts() if counts is None else counts
    texts = [list(prompt) for prompt in prompts]
    waiting = list(range(len(prompts)))
    rows: list[int] = []  # of `texts`, those being written
    parts: list[tuple[State, int]] = []  # where each of them has its cache

    def goes_on(row: int, token: int) -> bool:
        if token in ends:
            return False
        texts[row].append(token)
        counts.tokens += 1
        return take(row, token)

    while True:
        while waiting and len(rows) < (batch if runtime.joins else 1):
            row = waiting.pop(0)
            with counts.reading():
                fresh = runtime.prefill(np.asarray([texts[row]], dtype=np.int32))
                token = choosers[row](fresh.logits[0], texts[row])
            counts.prompt_tokens += len(texts[row])
            if goes_on(row, token):
                rows.append(row)
                parts.append((fresh, 0))
        if not rows:
            return
        with counts.writing():
            state = _side_by_side(runtime, parts)
            state = runtime.decode(state, np.asarray([texts[row][-1] for row in rows], dtype=np.int32))
            tokens = [choosers[row](state.logits[i], texts[row]) for i, row in enumerate(rows)]
        counts.calls += 1
        counts.decoded += sum(token not in ends for token in tokens)
        going = [i for i, (row, token) in enumerate(zip(rows, tokens, strict=True)) if goes_on(row, token)]
        rows, parts = [rows[i] for i in going], [(state, i) for i in going]


def _side_by_side(runtime: TextRuntime, parts: Sequence[tuple[State, int]]) -> State:
    """One state with the rows of others; no copy where that is a state as it is."""
    first = parts[0][0]
    in_place = all(state is first and row == i for i, (state, row) in enumerate(parts))
    return first if in_place and len(first.logits) == len(parts) else runtime.join(parts)
