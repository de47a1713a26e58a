"""ONNX Runtime behind the one face, for encoders: a whole text in, every position's answer out.

A graph of `export_onnx` reads `input_ids` and `attention_mask` (and `token_type_ids` where the model tells
two texts apart by them; all are of the first unless told) and gives logits or hidden states of all positions.
Nothing is kept between calls, so there is nothing to decode with.

Imports neither torch nor transformers: their memory would be counted as this runtime's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.errors import UserError
from compress.host.files import read_json
from compress.runtimes.base import Ids, Logits, State, Tokens, Waiting, padded_rows
from compress.runtimes.onnx_session import (
    GRAPH,
    PADDING,
    RIGHT,
    facts_of,
    files_of,
    graph_file,
    open_session,
    refused_at_run,
    require_side,
)
from compress.tasks.base import Task
from compress.tasks.registry import task_named


def holds_encoder(path: Path) -> bool:
    """Whether a folder (or `onnx` in it) holds an encoder, by the manifest that its export left.

    Raises:
        UserError: the manifest cannot be read.
    """
    for folder in (path, path / "onnx"):
        manifest = folder / "manifest.json"
        if (folder / GRAPH).is_file() and manifest.is_file():
            facts = read_json(manifest).get("onnx")
            return isinstance(facts, dict) and _encodes(task_named(facts.get("task")))
    return False


def _encodes(task: Task | None) -> bool:
    return task is not None and not task.writes


@dataclass(frozen=True)
class Read:
    """What is left of a text that was read: its last position's answer (batch, width), its length."""

    logits: Logits
    length: int


class OnnxEncoder:
    """An encoder's ONNX artifact folder, loaded; `path` may also be the variant's folder."""

    name = "onnxruntime"

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        provider: str = "cpu",
        waiting: Waiting = "spin",
    ) -> None:
        """Load; `threads` None leaves the number to ONNX Runtime, `provider` runs what it can of the graph.

        Raises:
            UserError: no model, no such provider, or one that does not start.
        """
        self._files = files_of(graph_file(path))
        self._path = path
        self._session = open_session(graph_file(path), threads, provider, waiting=waiting)
        self.device = provider
        facts = facts_of(self._session, path)
        self._inputs = {value.name for value in self._session.get_inputs()}
        task = task_named(facts["task"])
        assert task is not None
        self.task: Task = task
        self.takes_left = facts.get(PADDING) != RIGHT
        self.mask_token: int | None = int(facts["mask_token"]) if "mask_token" in facts else None
        self.context = int(facts["context"])
        self.weight_bytes = int(facts["weight_bytes"])

    def logits(self, tokens: Tokens, types: Tokens | None = None) -> Logits:
        """Every position's logits, or last hidden states: (batch, length) -> (batch, length, width); of a
        classifier of texts those of its labels, (batch, 1, labels); of answers those of both ends (batch,
        length, 2).

        `types` (batch, length): which of two texts each token is of.
        """
        more = () if types is None else (types,)
        return self.masked(tokens, np.ones(tokens.shape, dtype=np.int64), *more)

    def masked(self, tokens: Tokens | Ids, mask: Ids, types: Tokens | None = None) -> Logits:
        """The same for rows of which `mask` (batch, length) is 0 where they are padded.

        What is given for padded positions means nothing. Raises UserError for padding on the left where the
        graph does not take it.
        """
        require_side(self.takes_left, mask)
        if tokens.shape[1] > self.context:
            raise UserError(f"{tokens.shape[1]} tokens exceed the model's context of {self.context}")
        ids = tokens.astype(np.int64)
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        if types is not None:
            given["token_type_ids"] = types.astype(np.int64)
        taken = {name: value for name, value in given.items() if name in self._inputs}
        self._files.require()
        try:
            given_back = self._session.run(None, taken)
        except Exception as error:
            raise refused_at_run(error, self._path) from None
        answer: Logits = np.stack(given_back, -1) if self.task.columns else given_back[0]
        return answer[:, None] if self.task.pooled else answer

    def padded(self, texts: Sequence[Tokens], padding: int, *, left: bool = False) -> list[Logits]:
        """`logits` of texts of any lengths, as one batch, padded on the right or left."""
        ids, mask = padded_rows(texts, padding, left=left)
        answers = self.masked(ids, mask)
        if self.task.pooled:
            return list(answers)
        return [answer[real == 1] for answer, real in zip(answers, mask, strict=True)]

    def prefill(self, tokens: Tokens) -> State:
        """Read texts (batch, length): one forward pass."""
        return Read(self.logits(tokens)[:, -1], tokens.shape[1])

    def decode(self, state: State, tokens: Tokens) -> State:
        """Refused: an encoder appends nothing."""
        raise UserError("an encoder reads whole texts and continues none")
