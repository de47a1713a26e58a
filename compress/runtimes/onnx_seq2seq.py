"""ONNX Runtime behind the one face, for encoder-decoders: a source in, a text out, token by token.

The encoder runs once per source, the decoder once per token, on the whole text so far: it keeps no keys and
values, so a text of n tokens costs n passes over its own length.

Imports neither torch nor transformers: their memory would be counted as this runtime's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.runtimes.base import Ids, Logits, State, Tokens, padded_rows
from compress.runtimes.onnx_session import DECODER, ENCODER, graph_file, open_session
from compress.tasks import Task, halves


@dataclass(frozen=True)
class Written:
    """What the encoder made of a source, its mask, the decoder's text so far, and the next token's logits."""

    encoded: NDArray[np.float32]
    mask: Ids
    text: Ids
    logits: Logits
    length: int


class OnnxSeq2Seq:
    """An encoder-decoder's ONNX artifact folder, loaded; `path` may also be the variant's folder."""

    name = "onnxruntime"
    task: Task = "seq2seq"
    mask_token = None
    joins = rewinds = False

    def __init__(self, path: Path, threads: int | None = None, provider: str = "cpu") -> None:
        """Load; `threads` None leaves the number to ONNX Runtime, `provider` runs what it can of the graphs.

        Raises:
            UserError: no model, no such provider, or one that does not start.
        """
        self._decoder = open_session(graph_file(path, DECODER), threads, provider)
        self._encoder = open_session(graph_file(path, ENCODER), threads, provider)
        self.device = provider
        facts = self._decoder.get_modelmeta().custom_metadata_map
        self._start = int(facts["start_token"])
        self.context = int(facts["context"])
        self.weight_bytes = int(facts["weight_bytes"])

    def logits(self, tokens: Tokens) -> Logits:
        """For the second half of windows (batch, length): (batch, length - length // 2, vocabulary)."""
        source, target = halves(tokens.astype(np.int64))
        return self._answers(source, np.ones_like(source), target)

    def padded(self, texts: Sequence[Tokens], padding: int) -> list[Logits]:
        """`logits` of texts of any lengths, their halves in one batch, padded on the right."""
        sources, targets = zip(*(halves(text) for text in texts), strict=True)
        answers = self._answers(*padded_rows(sources, padding), padded_rows(targets, padding)[0])
        return [answer[: len(target)] for answer, target in zip(answers, targets, strict=True)]

    def prefill(self, tokens: Tokens) -> State:
        """Read sources (batch, length); the logits are those of the first token of the text."""
        source = tokens.astype(np.int64)
        mask = np.ones_like(source)
        text = np.full_like(source[:, :1], self._start)
        return self._next(self._encode(source, mask), mask, text, tokens.shape[1])

    def decode(self, state: State, tokens: Tokens) -> State:
        """Append one token per row, (batch,), to the text."""
        assert isinstance(state, Written)
        text = np.concatenate([state.text, tokens[:, None].astype(np.int64)], axis=1)
        return self._next(state.encoded, state.mask, text, state.length + 1)

    def join(self, parts: Sequence[tuple[State, int]]) -> State:
        """Refused, as `joins` says."""
        raise UserError("texts of an encoder-decoder are written one by one")

    def append(self, state: State, tokens: Tokens) -> tuple[State, Logits]:
        """Refused, as `rewinds` says."""
        raise UserError("an encoder-decoder cannot step back in its text; leave the draft out")

    def rewind(self, state: State, length: int) -> State:
        """Refused, as `rewinds` says."""
        raise UserError("an encoder-decoder cannot step back in its text; leave the draft out")

    def _next(self, encoded: NDArray[np.float32], mask: Ids, text: Ids, length: int) -> Written:
        logits = self._decode(encoded, mask, text)[:, -1]
        return Written(encoded, mask, text, logits, length)

    def _answers(self, source: Ids, mask: Ids, target: Ids) -> Logits:
        start = np.full_like(target[:, :1], self._start)
        text = np.concatenate([start, target[:, :-1]], axis=1)
        return self._decode(self._encode(source, mask), mask, text)

    def _encode(self, source: Ids, mask: Ids) -> NDArray[np.float32]:
        self._require_room(source)
        given = {"input_ids": source, "attention_mask": mask}
        states: NDArray[np.float32] = self._encoder.run(None, given)[0]
        return states

    def _decode(self, encoded: NDArray[np.float32], mask: Ids, text: Ids) -> Logits:
        self._require_room(text)
        given = {"input_ids": text, "encoder_attention_mask": mask, "encoder_hidden_states": encoded}
        logits: Logits = self._decoder.run(None, given)[0]
        return logits

    def _require_room(self, ids: Ids) -> None:
        if ids.shape[1] > self.context:
            raise UserError(f"{ids.shape[1]} tokens exceed the model's context of {self.context}")
