"""One text, one token per call of the model."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from compress.generation.counts import Counts
from compress.generation.sampling import Chooser
from compress.runtimes.base import Runtime


def continue_tokens(
    runtime: Runtime,
    prompt: Sequence[int],
    choose: Chooser,
    limit: int,
    ends: Collection[int] = (),
    counts: Counts | None = None,
) -> Iterator[int]:
    """At most `limit` new token ids after `prompt`, ended before a token of `ends`; `counts` is added to."""
    counts = Counts() if counts is None else counts
    text = list(prompt)
    with counts.reading():
        state = runtime.prefill(np.asarray([text], dtype=np.int32))
        token = choose(state.logits[0], text)
    counts.prompt_tokens += len(text)
    for count in range(1, limit + 1):
        if token in ends:
            return
        text.append(token)
        counts.tokens += 1
        counts.decoded += count > 1
        yield token
        if count < limit:
            with counts.writing():
                state = runtime.decode(state, np.asarray([token], dtype=np.int32))
                token = choose(state.logits[0], text)
            counts.calls += 1
