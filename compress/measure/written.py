"""What an encoder-decoder writes of labelled sources, greedily: the texts that it is judged by.

The process that holds the artifact writes tokens, in its runtime and with its cache, as in use: the likeliest
token after each, until one that ends a text or until the limit (`measure.answer_tokens`, the end counted, as
transformers counts `max_new_tokens`). Sources of one length are read together, as many as the runtime lets
share a call, so that none is padded. Tokens become text here, by the artifact's own tokenizer.

Limits: of a generation config only the tokens that end a text and the one that is forced to begin it are
heeded; no beams, no penalties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.generation.text import end_tokens, forced_first_token
from compress.runtimes.base import Runtime, State
from compress.tasks.written import Text, greedily
from compress.text.examples import Examples


def how_to_write(folder: Path, tokenizer: Any, limit: int) -> dict[str, Any]:
    """What `write_texts` is told of an artifact: plain values, for the pipe between processes."""
    own = tokenizer.eos_token_id
    ends = sorted({*end_tokens(folder), *([] if own is None else [int(own)])})
    return {"limit": limit, "ends": ends, "first": forced_first_token(folder)}


def write_texts(
    runtime: Runtime,
    examples: Examples,
    part: range,
    *,
    limit: int,
    ends: Sequence[int],
    first: int | None = None,
    together: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> list[Text]:
    """A text of each example of a part.

    Args:
        runtime: of a model that writes.
        examples: with the sources.
        part: which of them.
        limit: tokens of a text at most, the one that ends it counted.
        ends: tokens that end a text.
        first: the token that every text begins with, whatever its logits.
        together: how many sources may share a call.
        advance: called after each text.
    """
    found: list[Text] = []
    for sources in _alike([examples[index].ids for index in part], together):
        found += _written(runtime, np.stack(sources), min(limit, runtime.context), set(ends), first)
        for _ in sources:
            advance()
    return found


def _alike(sources: Sequence[npt.NDArray[np.int32]], together: int) -> Iterator[list[npt.NDArray[np.int32]]]:
    """Neighbours of one length."""
    group: list[npt.NDArray[np.int32]] = []
    for source in sources:
        if group and (len(source) != len(group[0]) or len(group) == together):
            yield group
            group = []
        group.append(source)
    if group:
        yield group


def _written(
    runtime: Runtime, sources: npt.NDArray[np.int32], limit: int, ends: set[int], first: int | None
) -> list[Text]:
    """Texts of sources (n, length)."""
    state = runtime.prefill(sources)

    def following(tokens: list[int]) -> list[int]:
        nonlocal state
        state = runtime.decode(state, np.array(tokens, dtype=np.int32))
        return _likeliest(state)

    tokens = _likeliest(state) if first is None else [first] * len(sources)
    return greedily(tokens, following, limit, ends)


def _likeliest(state: State) -> list[int]:
    found: list[int] = state.logits.argmax(-1).tolist()
    return found
