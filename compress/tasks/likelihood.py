"""Answers that are logits of tokens: how likely the text is, and how far the distributions are apart.

With logits z and ln Z = logsumexp(z): -ln p(t) = ln Z - z_t, and

    KL(b || v) = sum_w p_b(w) (z_b(w) - z_v(w)) - ln Z_b + ln Z_v.

Logits are float32 as a runtime gives them; normalisers and all sums are accumulated in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from compress.tasks.scoring import Columns, Intervals, Rows, Scoring

_LARGEST_EXPONENT = 709.0  # whose exp is a float64
_ROWS = 64  # positions whose logits are widened at once


class Likelihood(Scoring):
    """Nats per token; KL and agreement with the base."""

    distance_name: ClassVar[str] = "KL"
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 2e-3, "weights": 1e-3, "activations": 0.05}

    def sums(self, rows: Rows, targets: npt.NDArray[Any], base: Rows | None) -> tuple[float, ...]:
        """Nats, KL and agreements."""
        top, weights, total = _exponentials(rows)
        log_z = top + np.log(total)  # float64 [rows]
        nats = float((log_z - rows[np.arange(len(targets)), targets]).sum())
        if base is None:
            return nats, 0.0, 0.0
        base_top, base_weights, base_total = _exponentials(base)
        base_log_z = base_top + np.log(base_total)
        np.subtract(base, rows, out=weights)  # reuse the buffer: z_b - z_v
        np.multiply(weights, base_weights, out=weights)
        cross = weights.sum(axis=1, dtype=np.float64) / base_total
        agreements = (rows.argmax(axis=1) == base.argmax(axis=1)).sum()
        return nats, float((cross - base_log_z + log_z).sum()), float(agreements)

    def columns(self, windows: Sequence[tuple[float, ...]], *, compared: bool) -> Columns:
        """`nats`, and with a base `kl` and `agreements`."""
        nats = [sums[0] for sums in windows]
        if not compared:
            return {"nats": nats}
        return {
            "nats": nats,
            "kl": [sums[1] for sums in windows],
            "agreements": [int(sums[2]) for sums in windows],
        }

    def summary(
        self, scores: Columns, base: Columns | None, text_bytes: int | None, interval: Intervals
    ) -> Columns:
        """Likelihood, and what it and the distributions are to the base's."""
        nats, count = scores["nats"], sum(scores["tokens"])
        if not nats:
            return {}
        total = sum(nats)
        nll = total / count
        found: dict[str, Any] = {
            "nll": nll,
            "nll_ci95": interval(nats),
            "perplexity": exp(nll) if nll < _LARGEST_EXPONENT else None,
            "bits_per_byte": None if text_bytes is None else total / (log(2.0) * text_bytes),
        }
        if base is None:
            return found
        found["delta_nll"] = nll - sum(base["nats"]) / count
        found["delta_nll_ci95"] = interval(nats, base["nats"])
        kl, agreements = scores["kl"], scores["agreements"]
        if kl is not None and agreements is not None:
            found["kl_to_base"] = sum(kl) / count
            found["kl_ci95"] = interval(kl)
            found["top1_agreement"] = sum(agreements) / count
        return found

    def distance(self, expected: Rows, found: Rows) -> float:
        """Mean KL."""
        return mean_kl(expected, found)


LIKELIHOOD = Likelihood()


def mean_kl(expected: Rows, found: Rows) -> float:
    """Mean KL(expected || found) over positions, from logits (positions, vocabulary), in float64."""
    total = 0.0
    for start in range(0, len(expected), _ROWS):
        p, q = (log_softmax(logits[start : start + _ROWS]) for logits in (expected, found))
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(expected)


def log_softmax(logits: Rows) -> npt.NDArray[np.float64]:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _exponentials(logits: Rows) -> tuple[npt.NDArray[np.float64], Rows, npt.NDArray[np.float64]]:
    """Row maxima m [rows], exp(z - m) [rows, V] and its row sums."""
    top = logits.max(axis=1, keepdims=True)
    weights = logits - top
    np.exp(weights, out=weights)
    return top[:, 0].astype(np.float64), weights, weights.sum(axis=1, dtype=np.float64)
