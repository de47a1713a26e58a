"""Speculative decoding: a small model guesses some tokens, the large one checks them all in one call.

Leviathan, Kalman, Matias 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318). The draft
proposes x_1 .. x_n from its distributions q_1 .. q_n. One call of the target gives p_1 .. p_{n+1}, the last
one for the token after them. x_i is kept with probability min(1, p_i(x_i) / q_i(x_i)), up to the first that
is not; in its place comes a token from max(0, p_i - q_i), scaled to sum to one. If all are kept, one more
comes from p_{n+1}. Each token then has exactly the target's distribution (Leviathan, appendix A.1):

    q(x) min(1, p(x)/q(x)) + P(rejected) max(0, p(x) - q(x)) / P(rejected) = p(x).

Greedy is the case where p and q have all their probability on one token: the tokens are those of the
target alone. Both p and q are what temperature, top-k and the like have made of the logits.

Cost: per round n calls of the draft and one of the target on n + 1 tokens, for (1 - a^(n+1)) / (1 - a)
tokens where each guess is kept with probability a (their equation 1). `DraftLength` picks n by their
theorem 3.8 from the share kept so far and from what a guess costs: what a token takes the draft, compared
with the target (`step_bytes`), and one token more to check (ONNX Runtime on two cores, in calls of the
target: 2 MB guessing for 16 MB 0.52 and 0.11; 87 MB for 538 MB 0.33 and 0.05, 50 MB 0.26 and 0.11). No clock
decides, so the same seed gives the same text. A draft that is wrong too often to pay is asked for one guess
every few rounds, to see whether it pays by now.
Gain: where reading weights is what decoding waits for, and the draft is much smaller and mostly right.
Limits: one text at a time. "The tokens of the target alone" holds up to rounding: a call on several tokens
may add up in another order than calls on one, which decides between two tokens whose logits are equal to
about seven digits. Where a graph of codes rounds activations to 8 bits, ONNX Runtime may round a single
token's otherwise than those of several (SmolLM2-135M in int4, AVX2: 3 of 40 likeliest tokens differ, both
ways as near to the codes' own, KL 0.006): then a draft changes the text, within that rounding.
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from compress.generation.counts import Counts
from compress.generation.sampling import Chooser, Probabilities
from compress.runtimes.base import Logits, State, TextRuntime

_MEMORY = 0.9  # weight of what is known about acceptance, after each further round
_HOPE = (4.0, 5.0)  # tokens kept and tokens judged, before any were
_PROBE = 16  # rounds between guesses of a draft that does not pay
_CHECK = 0.1  # calls of the target that a token more to check takes


def accept_greedy(drafted: Sequence[int], wanted: Sequence[int]) -> tuple[int, int]:
    """(how many of `drafted` are the target's likeliest, the token that follows them).

    `wanted`: the target's likeliest at each of the n places and after them.

    >>> accept_greedy([7, 8, 9], [7, 8, 5, 3])
    (2, 5)
    """
    kept = 0
    while kept < len(drafted) and drafted[kept] == wanted[kept]:
        kept += 1
    return kept, wanted[kept]


def accept(
    drafted: Sequence[int],
    draft: Sequence[Probabilities],
    target: Sequence[Probabilities],
    choose: Chooser,
) -> tuple[int, int]:
    """(how many of `drafted` are kept, the token that follows them).

    `drafted`: n tokens, each drawn from its distribution in `draft`, n of (vocabulary,); `target`: n + 1.
    """
    for i, token in enumerate(drafted):
        if choose.random.random() * draft[i][token] < target[i][token]:
            continue
        residual = np.maximum(target[i] - draft[i], 0)
        total = residual.sum()
        # equal but for rounding: then the target's own
        return i, choose.draw(residual / total if total > 0 else target[i])
    return len(drafted), choose.draw(target[len(drafted)])


def best_length(acceptance: float, cost: float, longest: int) -> int:
    """The n in 0 .. longest with the most tokens per unit of time, (1 - a^(n+1)) / ((1 - a) (1 + n cost)).

    `acceptance`: probability a that a guess is kept; `cost`: time of a draft's call in calls of the target.

    >>> [best_length(a, 0.2, 8) for a in (0.1, 0.3, 0.5, 0.8, 1.0)]
    [0, 1, 1, 4, 8]
    """
    lengths = np.arange(longest + 1)
    powers = np.cumsum(acceptance**lengths)  # 1 + a + ... + a^n
    return int(lengths[np.argmax(powers / (1 + lengths * cost))])


class DraftLength:
    """How many tokens to guess next, from how many were kept lately."""

    def __init__(self, longest: int, cost: float) -> None:
        self.longest, self.cost = longest, cost
        self.kept, self.judged = _HOPE
        self.waited = 0

    def __call__(self) -> int:
        """The length of the next draft, at most `longest`."""
        best = best_length(self.kept / self.judged, self.cost, self.longest)
        self.waited = 0 if best or self.waited == _PROBE else self.waited + 1
        return best if self.waited else max(1, best)

    def learn(self, drafted: int, accepted: int) -> None:
        """Those after the first that was refused were not judged."""
        self.kept = _MEMORY * self.kept + accepted
        self.judged = _MEMORY * self.judged + accepted + (accepted < drafted)


def speculate(
    target: TextRuntime,
    draft: TextRuntime,
    prompt: Sequence[int],
    choose: Chooser,
    limit: int,
    ends: Collection[int] = (),
    *,
    longest: int = 4,
    counts: Counts | None = None,
) -> Iterator[int]:
    """At most `limit` new token ids after `prompt`, ended before a token of `ends`; `counts` is added to.

    Drafts have at most `longest` tokens. Where the text outgrows the draft's context the target goes on
    alone.
    """
    counts = Counts() if counts is None else counts
    length = DraftLength(longest, draft.step_bytes / max(1, target.step_bytes) + _CHECK)
    text = list(prompt)
    with counts.reading():
        state = target.prefill(np.asarray([text], dtype=np.int32))
        new = [choose(state.logits[0], text)]
        guesser = _Draft(draft, choose, vocabulary=state.logits.shape[1])
        guesser.read(text)
    counts.prompt_tokens += len(text)
    left = limit
    while True:
        for token in new:
            if token in ends or left == 0:
                return
            text.append(token)
            counts.tokens += 1
            counts.decoded += left < limit
            left -= 1
            yield token
        if left == 0:
            return
        with counts.writing():
            # at the end one token is wanted, and it needs no guess
            drafted, q = guesser.guess(text, min(length(), left - 1))
            if drafted:
                state, logits = target.append(state, np.asarray([text[-1], *drafted], dtype=np.int32))
                accepted, following = _judge(logits, text, drafted, q, choose)
                state = target.rewind(state, len(text) + accepted)
                guesser.rewind(len(text) + accepted)
            else:  # a call of its own for one token is cheaper
                state = target.decode(state, np.asarray([text[-1]], dtype=np.int32))
                accepted, following = _judge(state.logits, text, [], [], choose)
        counts.calls += 1
        counts.drafted += len(drafted)
        counts.accepted += accepted
        if drafted:
            length.learn(len(drafted), accepted)
        new = [*drafted[:accepted], following]


class _Draft:
    """The draft model and what it has read; `vocabulary`: the number of the target's logits."""

    def __init__(self, runtime: TextRuntime, choose: Chooser, vocabulary: int) -> None:
        self.runtime, self.choose, self.vocabulary = runtime, choose, vocabulary
        self.state: State | None = None

    def read(self, text: Sequence[int]) -> None:
        """Begin with a prompt; one that fills the draft's context is not read, and nothing guessed."""
        if len(text) < self.runtime.context:
            self.state = self.runtime.prefill(np.asarray([text], dtype=np.int32))

    def guess(self, text: Sequence[int], count: int) -> tuple[list[int], list[Probabilities]]:
        """At most `count` tokens after `text`, and the distribution of each; none of them where greedy."""
        drafted: list[int] = []
        rows: list[Probabilities] = []
        if self.state is None:
            return drafted, rows
        unread = list(text[self.state.length :])
        if max(unread) >= self.state.logits.shape[1]:  # of the target's padding: unknown here
            self.state = None
            return drafted, rows
        sampling = self.choose.sampling
        while len(drafted) < min(count, self.runtime.context - len(text) + 1):
            self.state, logits = self.runtime.append(self.state, np.asarray(unread, dtype=np.int32))
            scores = fitted(logits[-1], self.vocabulary)
            if sampling.temperature == 0:
                unread = [sampling.greedy(scores, [*text, *drafted])]
            else:
                rows.append(sampling.distribution(scores, [*text, *drafted]))
                unread = [self.choose.draw(rows[-1])]
            drafted += unread
        return drafted, rows

    def rewind(self, length: int) -> None:
        """Forget guesses that were refused."""
        if self.state is not None:
            self.state = self.runtime.rewind(self.state, min(length, self.state.length))


def _judge(
    logits: Logits,
    text: Sequence[int],
    drafted: Sequence[int],
    draft: Sequence[Probabilities],
    choose: Chooser,
) -> tuple[int, int]:
    """As `accept`, from the target's logits (n + 1, vocabulary) after `text` and after each guess."""
    sampling = choose.sampling
    rows = [(row, [*text, *drafted[:i]]) for i, row in enumerate(logits)]
    if sampling.temperature == 0:
        return accept_greedy(drafted, [sampling.greedy(row, before) for row, before in rows])
    return accept(drafted, draft, [sampling.distribution(row, before) for row, before in rows], choose)


def fitted(logits: Logits, vocabulary: int) -> Logits:
    """Logits of a model that pads the same tokenizer's vocabulary differently: cut, or filled with -inf.

    >>> fitted(np.array([0.5, 0.5], dtype=np.float32), 3)
    array([ 0.5,  0.5, -inf], dtype=float32)
    """
    if len(logits) >= vocabulary:
        return logits[:vocabulary]
    return np.pad(logits, (0, vocabulary - len(logits)), constant_values=-np.inf)
