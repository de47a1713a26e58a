"""Asks a decoder for labels: how likely is each after a prompt, in whatever runtime the decoder is.

The prompt is read once, and its last logits give every label's first token; where the runtime joins rows,
those of longer labels go on from copies of what it remembers, many labels at a time. A runtime that does not
join them reads the prompt with each label, those of a length together.

Cost: a text costs its prompt and one decode step for every token but the first of its longest label, of as
many rows as there are labels; where rows are not joined, labels times prompt.

Imports no model library: the process that is measured asks so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from compress.measure.quality import TOGETHER_BYTES, Logits
from compress.runtimes.base import Runtime
from compress.tasks.likelihood import log_softmax
from compress.text.examples import Examples

_ROWS = 64  # labels that go on together


class LabelLikelihood:
    """A runtime's decoder as a classifier: called with prompts (n, length), it gives the s of
    tasks/prompted.py of every label, (n, 1, labels)."""

    def __init__(self, runtime: Runtime, examples: Examples) -> None:
        """Of examples that are prompts."""
        assert examples.prompt is not None
        self._runtime, self._choices, self._per_token = runtime, examples.choices, examples.prompt.per_token
        self._lengths = np.array([len(choice) for choice in self._choices])

    def __call__(self, tokens: npt.NDArray[np.int32]) -> Logits:
        """(n, length) -> float32 (n, 1, labels)."""
        asked = self._continued if getattr(self._runtime, "joins", False) else self._whole
        found = np.stack([asked(prompt) for prompt in tokens])
        return (found / self._lengths if self._per_token else found).astype(np.float32)[:, None]

    def _continued(self, prompt: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """ln p of each label, (labels,), from copies of a prompt that is read once."""
        runtime: Any = self._runtime
        state = runtime.prefill(prompt[None])
        found = log_softmax(state.logits[0])[[int(choice[0]) for choice in self._choices]]
        longer = [int(i) for i in np.argsort(self._lengths, kind="stable") if self._lengths[i] > 1]
        for start in range(0, len(longer), _ROWS):
            part = longer[start : start + _ROWS]
            rows = runtime.join([(state, 0)] * len(part))
            for step in range(1, int(self._lengths[part[-1]])):
                # a label that has ended is fed its last token again, and what follows is not looked at
                given = [self._choices[i][min(step, self._lengths[i]) - 1] for i in part]
                rows = runtime.decode(rows, np.array(given, dtype=np.int32))
                likely = log_softmax(rows.logits)
                for place, i in enumerate(part):
                    if step < self._lengths[i]:
                        found[i] += likely[place, self._choices[i][step]]
        return found

    def _whole(self, prompt: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """The same, from the prompt with each label behind it."""
        found = np.zeros(len(self._choices))
        first = len(prompt) - 1  # its row gives the label's first token
        for length in np.unique(self._lengths).tolist():
            alike = np.flatnonzero(self._lengths == length)
            together = 1
            while len(alike):
                part, alike = alike[:together], alike[together:]
                own = np.stack([self._choices[i] for i in part])
                tokens = np.concatenate([np.tile(prompt, (len(part), 1)), own], axis=1).astype(np.int32)
                logits = self._runtime.logits(tokens)
                likely = log_softmax(logits[:, first:-1])  # (labels, length, vocabulary)
                found[part] = np.take_along_axis(likely, own[..., None].astype(np.int64), -1)[..., 0].sum(-1)
                together = max(1, TOGETHER_BYTES * len(part) // logits.nbytes)
        return found
