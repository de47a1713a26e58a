"""embedding: an encoder without a head (MiniLM): a text is a vector made of its last hidden states.

By default the mean of them; or that of the first token or the last, where the files beside the model say so
(models/companions.py), each a task of its own. It is judged by that vector, e, of a window:

    cosine_distance = mean over windows of 1 - <e_base, e> / (|e_base| |e|)

Where evaluation rows are pairs of texts, windows are these texts, each distinct one by itself, and what the
vectors are for is judged besides (tasks/retrieval.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from compress.tasks.base import Example, Question, Task, Window
from compress.tasks.decisions import Decisions
from compress.tasks.retrieval import BY_KIND, RETRIEVAL, SIMILARITY
from compress.tasks.scoring import Columns, Intervals, Rows, Scoring


class Cosine(Scoring):
    """1 - cosine of the angle to what the base gives."""

    distance_name: ClassVar[str] = "1 - cosine"
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 2e-3, "weights": 1e-4, "activations": 0.01}

    def kept(self, rows: Rows) -> Rows:
        """The mean of the states that count (1, width)."""
        mean: Rows = rows.mean(axis=0, keepdims=True)
        return mean

    def counted(self, targets: npt.NDArray[Any]) -> int:
        """A window is one text."""
        return 1

    def sums(self, rows: Rows, targets: npt.NDArray[Any], base: Rows | None) -> tuple[float, ...]:
        """The distance of the one row."""
        return (0.0 if base is None else _cosine_distance(base[0], rows[0]),)

    def columns(self, windows: Sequence[tuple[float, ...]], *, compared: bool) -> Columns:
        """`distances`, with a base; nothing was predicted."""
        return {"nats": [], "distances": [sums[0] for sums in windows] if compared else None}

    def summary(
        self, scores: Columns, base: Columns | None, text_bytes: int | None, interval: Intervals
    ) -> Columns:
        """The mean distance, and what pairs of texts say."""
        found: dict[str, Any] = {}
        if distances := scores["distances"]:
            found |= {"cosine_distance": sum(distances) / len(distances), "cosine_ci95": interval(distances)}
        judge = self.judge(scores)
        if judge is None:
            return found
        judged = judge.judged(scores)
        assert judged is not None
        before = None if base is None else judge.judged(base)
        return {**found, **judge.compared(judged, before, interval)}

    def judge(self, scores: Columns) -> Decisions | None:
        """What pairs of texts are judged by, where they are such."""
        if not scores["pairs"]:
            return None
        return SIMILARITY if len(scores["pairs"][0]) > 2 else RETRIEVAL

    def distance(self, expected: Rows, found: Rows) -> float:
        """Of the mean states, in float64."""
        a, b = (rows.mean(0, dtype=np.float64) for rows in (expected, found))
        return _cosine_distance(a, b)


class Embedding(Task):
    """To embed text."""

    name: ClassVar[str] = "embedding"
    noun: ClassVar[str] = "an encoder"
    auto_class: ClassVar[str] = "AutoModel"
    output: ClassVar[Literal["logits", "last_hidden_state"]] = "last_hidden_state"
    predicts: ClassVar[bool] = False
    embeds: ClassVar[bool] = True
    scoring: ClassVar[Scoring] = Cosine()
    pooling: ClassVar[str] = "mean"
    states: ClassVar[slice] = slice(None)  # that count

    def claims(self, config: Any, architecture: str) -> bool:
        """A model of a kind that could have a masked-LM head, and has none, and is pooled so."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        headless = architecture.endswith("Model") and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        return headless and getattr(config, "pooling", "mean") == self.pooling

    def question(self, window: Window, index: int, mask_token: int | None = None) -> Question:
        """The whole window; nothing is predicted."""
        return Question(window, self.states, window[self.states])

    def asked(self, example: Example) -> Question:
        """One text of a pair, by itself."""
        return Question(example.ids, self.states, example.targets, example.types)

    def judged_by(self, kind: str) -> bool:
        """Pairs of texts, with a number or without."""
        return kind in BY_KIND


class EmbeddingByFirst(Embedding):
    """To embed text by the state of its first token."""

    name: ClassVar[str] = "embedding-cls"
    pooling: ClassVar[str] = "cls"
    states: ClassVar[slice] = slice(0, 1)


class EmbeddingByLast(Embedding):
    """To embed text by the state of its last token."""

    name: ClassVar[str] = "embedding-last"
    pooling: ClassVar[str] = "lasttoken"
    states: ClassVar[slice] = slice(-1, None)


EMBEDDING, EMBEDDING_CLS, EMBEDDING_LAST = Embedding(), EmbeddingByFirst(), EmbeddingByLast()


def _cosine_distance(base: npt.NDArray[np.floating[Any]], found: npt.NDArray[np.floating[Any]]) -> float:
    a, b = base.astype(np.float64), found.astype(np.float64)
    return float(1.0 - (a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
