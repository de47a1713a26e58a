"""The next token from logits: greedy, or drawn from a distribution that has been cut to what is likely.

Order: repetition penalty, temperature, top-k, top-p, min-p; then the rest is scaled to sum to one.

- Repetition penalty r (Keskar et al. 2019, arXiv 1909.05858): a token that the text holds already has its
  logit divided by r if positive, multiplied if not.
- Temperature t: softmax(logits / t). 0 is greedy: all probability on the largest logit.
- Top-k (Fan et al. 2018, arXiv 1805.04833): the k likeliest.
- Top-p (Holtzman et al. 2020, arXiv 1904.09751): the smallest set whose probability reaches p.
- Min-p (Nguyen et al. 2024, arXiv 2407.01082): tokens of at least p times the likeliest's probability.

Cost: one pass over the vocabulary, a sort of it with top-k or top-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError

Probabilities = NDArray[np.float64]

# field -> (smallest, largest, whether the smallest itself is refused)
_BOUNDS = {
    "temperature": (0.0, np.inf, False),
    "top_k": (0, np.inf, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "repetition_penalty": (0.0, np.inf, True),
    "seed": (0, np.inf, False),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults choose the likeliest.

    Raises:
        UserError: a value out of its bounds.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high, open_end) in _BOUNDS.items():
            value = getattr(self, name)
            # written so that a NaN fails
            if not (low <= value <= high) or (open_end and value == low):
                least = f"more than {low:g}" if open_end else f"at least {low:g}"
                most = "" if high == np.inf else f" and at most {high:g}"
                raise UserError(f"{name}: {value} is not valid; it must be {least}{most}")

    def distribution(self, logits: NDArray[np.float32], text: Sequence[int] = ()) -> Probabilities:
        """Probabilities of the token after `text`, (vocabulary,), from its logits; they sum to one.

        >>> Sampling(temperature=1.0, top_k=2).distribution(np.log([0.5, 0.25, 0.125, 0.125])).round(3)
        array([0.667, 0.333, 0.   , 0.   ])
        """
        scores = self._penalised(logits, text)
        result = np.zeros_like(scores)
        if self.temperature == 0:
            result[scores.argmax()] = 1
            return result
        scores /= self.temperature
        result = np.exp(scores - scores.max())  # the likeliest has 1
        result[result < self.min_p] = 0
        if self.top_k or self.top_p < 1:
            result = self._likeliest(result, scores)
        return result / result.sum()

    def greedy(self, logits: NDArray[np.float32], text: Sequence[int] = ()) -> int:
        """The likeliest token after `text`."""
        if self.repetition_penalty == 1:
            return int(logits.argmax())
        return int(self._penalised(logits, text).argmax())

    def _penalised(self, logits: NDArray[np.float32], text: Sequence[int]) -> Probabilities:
        scores = logits.astype(np.float64)
        if self.repetition_penalty != 1 and len(text):
            seen = np.unique(np.asarray(text))
            seen = seen[seen < len(scores)]
            old = scores[seen]
            scores[seen] = np.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty)
        return scores

    def _likeliest(self, kept: Probabilities, scores: Probabilities) -> Probabilities:
        """`kept`, what min-p left, with zeros where top-k or top-p cut; both look at all tokens."""
        order = np.argsort(-scores, kind="stable")
        ranked = np.exp(scores[order] - scores[order[0]])
        keep = np.ones(len(ranked), dtype=bool)
        if self.top_k:
            keep[self.top_k :] = False
            ranked[self.top_k :] = 0
        # a token stays if those before it fall short of p
        keep &= np.cumsum(ranked) - ranked < self.top_p * ranked.sum()
        result = np.zeros_like(kept)
        result[order[keep]] = kept[order[keep]]
        return result


class Chooser:
    """Draws tokens by one `Sampling`; the same seed draws the same. `row` tells texts of a batch apart.

    `first`: the token that a text begins with, whatever its logits.
    """

    def __init__(self, sampling: Sampling, row: int = 0, first: int | None = None) -> None:
        self.sampling, self._first = sampling, first
        self.random = np.random.default_rng(sampling.seed + row)

    def __call__(self, logits: NDArray[np.float32], text: Sequence[int]) -> int:
        """The token after `text`, from its logits (vocabulary,)."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        if self.sampling.temperature == 0:
            return self.sampling.greedy(logits, text)
        return self.draw(self.sampling.distribution(logits, text))

    def draw(self, probabilities: Probabilities) -> int:
        """A token id from a distribution (vocabulary,)."""
        return int(self.random.choice(len(probabilities), p=probabilities))
