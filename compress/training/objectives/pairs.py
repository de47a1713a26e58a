"""Learning where texts lie, from pairs that belong together, or whose likeness is a number.

Of n pairs (a_i, b_i) of a micro-batch, with s_ij = scale cos(a_i, b_j) of their embeddings,

    no label    -1/2n sum_i [ln softmax_j(s_ij)_i + ln softmax_j(s_ji)_i]
    a number    ln(1 + sum over pairs i, j with y_i > y_j of exp(scale [cos(a_j, b_j) - cos(a_i, b_i)]))

The first is contrastive with the other texts of the micro-batch as negatives, from both sides (InfoNCE, van
den Oord et al. 2018; sentence-transformers' MultipleNegativesSymmetricRankingLoss, scale 20); so a larger
`batch` has more negatives, and `accumulate` adds none. What belongs together in some training row, and a text
beside itself, is no negative. The second asks for the order of the numbers alone (CoSENT, Su 2022), so they
may be of any scale.

The held-out loss is the same, 32 pairs at a time; or one minus the task's own score on the held-out pairs: of
retrieval among their second texts, or of the correlation with the numbers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.models.running import Precision, autocast, evaluating
from compress.tasks.embedding import Embedding
from compress.tasks.retrieval import BY_KIND, SCALE, compared_pairs, cosines_between, ranked
from compress.text.examples import Examples
from compress.training.example_batches import padded
from compress.training.objectives.base import Moment, Objective
from compress.training.objectives.labelled import StopBy, ask
from compress.training.pair_batches import PairBatches
from compress.training.teaching.embedding import pooled

_TOGETHER = 32  # held-out texts per forward pass, and pairs of a held-out loss


def embedded_pairs(
    task: Embedding,
    material: PairBatches,
    heldout: Examples,
    padding: int,
    *,
    scale: float = SCALE,
    stop_by: StopBy = "loss",
) -> Objective:
    """The objective of embedding pairs.

    Args:
        task: says how states are pooled.
        material: the pairs to learn from.
        heldout: those that decide which weights to keep.
        padding: the token that fills rows.
        scale: of cosines: one over the temperature.
        stop_by: what is told of the held-out pairs.
    """
    known = Together(material.examples)

    def loss(outputs: Any, inputs: Mapping[str, Any], targets: Tensor, moment: Moment) -> Tensor:
        vectors = pooled(outputs[0], inputs["attention_mask"], task.states)
        firsts, seconds = vectors.chunk(2)
        return pair_loss(firsts, seconds, targets, known, scale)

    def judge(model: Any, precision: Precision) -> float:
        vectors = embedded(model, task, heldout, padding, precision)
        if stop_by == "score":
            return 1.0 - pair_score(vectors.numpy(), heldout)
        return _heldout_loss(vectors, heldout, scale)

    return Objective(loss, ask=ask, material=material, heldout=judge, notes={"scale": scale})


class Together:
    """Which texts belong together in some row."""

    def __init__(self, examples: Examples) -> None:
        self._count = len(examples)
        self._codes = np.unique([self._code(int(a), int(b)) for a, b, *_ in examples.pairs])

    def __call__(self, firsts: Tensor, seconds: Tensor) -> Tensor:
        """Numbers of texts (n,), (m,) -> (n, m) True where they do, or are the same."""
        one, other = (each.cpu().numpy().astype(np.int64) for each in (firsts, seconds))
        codes = self._code(one[:, None], other[None])
        found = np.isin(codes, self._codes) | (one[:, None] == other[None])
        return torch.from_numpy(found).to(firsts.device)

    def _code(self, one: Any, other: Any) -> Any:
        return np.minimum(one, other) * self._count + np.maximum(one, other)


def pair_loss(firsts: Tensor, seconds: Tensor, told: Tensor, known: Together, scale: float) -> Tensor:
    """Of embeddings (n, d) of either side (see the module's text).

    `told`: numbers of the texts, (n, 2), with the label of each pair behind them (n, 3) where there is one.
    """
    a, b = (F.normalize(each.float(), dim=-1) for each in (firsts, seconds))
    if told.shape[1] > 2:
        return cosent((a * b).sum(-1), told[:, 2], scale)
    scores = scale * a @ b.T  # (n, n)
    others = known(told[:, 0], told[:, 1])
    others.fill_diagonal_(False)  # the right one itself
    scores = scores.masked_fill(others, -torch.inf)
    right = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


def cosent(cosines: Tensor, numbers: Tensor, scale: float) -> Tensor:
    """Cosines of pairs (n,) and what is told of them (n,); 0 where no two numbers differ."""
    wrong = scale * (cosines[None] - cosines[:, None])  # i above j: s_j - s_i
    wanted = numbers[:, None] > numbers[None]
    terms = torch.cat([wrong.new_zeros(1), wrong[wanted]])
    return terms.logsumexp(0)


@torch.no_grad()
def embedded(model: Any, task: Embedding, examples: Examples, padding: int, precision: Precision) -> Tensor:
    """The embeddings of texts (texts, width), float32."""
    device, found = next(model.parameters()).device, []
    with evaluating(model):
        for start in range(0, len(examples), _TOGETHER):
            ids, mask, _ = padded(list(examples.items[start : start + _TOGETHER]), padding)
            rows, kept = (torch.from_numpy(each).to(device) for each in (ids, mask))
            with autocast(device, precision):
                states = model(input_ids=rows, attention_mask=kept)[0]
            found.append(pooled(states, kept, task.states).cpu())
    return torch.cat(found)


def pair_score(vectors: Any, examples: Examples) -> float:
    """The score of embeddings (texts, width) on the pairs of the texts."""
    judge, similarity = BY_KIND[examples.kind], cosines_between(vectors)
    judged = (ranked if examples.kind == "pair" else compared_pairs)(examples.pairs, similarity)
    return float(judge.statistic(judged)(np.ones((1, len(judged.decisions))))[0])


def _heldout_loss(vectors: Tensor, examples: Examples, scale: float) -> float:
    told, known = torch.tensor(examples.pairs), Together(examples)
    total = 0.0
    for part in told.split(_TOGETHER):
        one, other = (vectors[part[:, side].long()] for side in (0, 1))
        total += float(pair_loss(one, other, part, known, scale)) * len(part)
    return total / len(told)
