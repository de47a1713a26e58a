"""One face for everything that runs a model.

`measure` and `generate` know nothing else. Arrays are numpy, so that a runtime without torch needs no
torch: the peak memory that is reported for it would otherwise be torch's.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.tasks.base import Task

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]
Ids = NDArray[np.int64]  # tokens as a graph reads them
Waiting = Literal["spin", "stop", "sleep"]  # of threads, for each other


def padded_rows(texts: Sequence[NDArray[np.integer[Any]]], padding: int) -> tuple[Ids, Ids]:
    """Texts as rows (texts, longest), padded on the right, and their mask, 0 where they are."""
    longest = max(len(text) for text in texts)
    ids = np.full((len(texts), longest), padding, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return ids, mask


class State(Protocol):
    """What a model remembers of the text so far (its key-value cache), and its last logits."""

    @property
    def logits(self) -> Logits:
        """Logits of the next token, (batch, vocabulary)."""
        ...

    @property
    def length(self) -> int:
        """Tokens seen so far; of the longest row."""
        ...


class Runtime(Protocol):
    """A loaded artifact."""

    @property
    def name(self) -> str:
        """`torch` or `onnxruntime`."""
        ...

    @property
    def device(self) -> str:
        """`cpu`, `cuda` ..."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights as stored, tied ones counted once."""
        ...

    @property
    def task(self) -> Task:
        """What the model is for; only one that `writes` can `decode`."""
        ...

    @property
    def mask_token(self) -> int | None:
        """The token that stands for one to be filled in; None where the task hides none."""
        ...

    @property
    def context(self) -> int:
        """The largest number of tokens the model takes."""
        ...

    def logits(self, tokens: Tokens) -> Logits:
        """Every position's logits: (batch, length) -> (batch, length, vocabulary), float32.

        Of a model that embeds, every position's last hidden state: (batch, length, width). Of an
        encoder-decoder, the logits of the second half alone: (batch, length - length // 2, vocabulary).
        """
        ...

    def prefill(self, tokens: Tokens) -> State:
        """Read a prompt, (batch, length), computing logits for its last position only.

        Goes through it in chunks: attention's scores grow with the prompt, not with its square.
        """
        ...

    def decode(self, state: State, tokens: Tokens) -> State:
        """Append one token per row, (batch,). The state given may be used up by the call."""
        ...


class TextRuntime(Runtime, Protocol):
    """A loaded artifact that continues text."""

    @property
    def joins(self) -> bool:
        """Whether `join` works: rows of one call may have unlike lengths."""
        ...

    def join(self, parts: Sequence[tuple[State, int]]) -> State:
        """A state whose rows are rows of others: part (state, i) is row i of that state, which stays usable.

        Rows may have unlike lengths and keep their own; `length` is that of the longest.
        """
        ...

    @property
    def step_bytes(self) -> int:
        """How long a decoded token takes: in that time so many bytes of weights could be read.

        Those of the model, and what its calls and blocks take whatever their weights. By measurement, so that
        two models compare without a clock.
        """
        ...

    @property
    def rewinds(self) -> bool:
        """Whether `append` and `rewind` work: a model with a recurrent state cannot step back in its text."""
        ...

    def append(self, state: State, tokens: Tokens) -> tuple[State, Logits]:
        """Append tokens (n,) to a state of one row; the logits after each of them, (n, vocabulary).

        The state given is used up. A `rewind` follows, after this or some more of them, be it to the length
        reached; before it there is no `decode`.
        """
        ...

    def rewind(self, state: State, length: int) -> State:
        """Forget all but the first `length` tokens; not further back than where the first `append` since the
        last `rewind` began. What the state's `logits` are then is undefined."""
        ...
