"""ONNX Runtime behind the one face, for encoder-decoders: a source in, a text out, token by token.

The encoder runs once per source and leaves what each block of the decoder reads of it, keys and values; the
decoder takes one token at a time and keeps its own. They stay where ONNX Runtime put them.

Imports neither torch nor transformers: their memory would be counted as this runtime's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from compress.errors import UserError
from compress.runtimes.base import Ids, Logits, State, Tokens, Waiting, padded_rows
from compress.runtimes.onnx_session import (
    DECODER,
    ENCODER,
    PADDING,
    PAST,
    PRESENT,
    RIGHT,
    facts_of,
    files_of,
    graph_file,
    open_session,
    refused_at_run,
    require_side,
)
from compress.tasks.base import Task
from compress.tasks.seq2seq import SEQ2SEQ, halves

Values = dict[str, onnxruntime.OrtValue]  # by the names under which the decoder reads them


@dataclass(frozen=True)
class Written:
    """A source that was read, with its mask; keys and values of the text so far; the next token's logits."""

    source: Values
    text: Values
    logits: Logits
    length: int


class OnnxSeq2Seq:
    """An encoder-decoder's ONNX artifact folder, loaded; `path` may also be the variant's folder."""

    name = "onnxruntime"
    task: Task = SEQ2SEQ
    mask_token = None
    joins = rewinds = False

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        provider: str = "cpu",
        waiting: Waiting = "spin",
    ) -> None:
        """Load; `threads` None leaves the number to ONNX Runtime, `provider` runs what it can of the graphs.

        Raises:
            UserError: no model, no such provider, or one that does not start.
        """
        self._files = files_of(graph_file(path, DECODER), graph_file(path, ENCODER))
        self._decoder = open_session(graph_file(path, DECODER), threads, provider, waiting=waiting)
        self._encoder = open_session(graph_file(path, ENCODER), threads, provider, waiting=waiting)
        self._own = {x.name: x.shape for x in self._decoder.get_inputs() if ".decoder." in x.name}
        self.device = provider
        facts = facts_of(self._decoder, path)
        self.takes_left = facts.get(PADDING) != RIGHT
        self._start = int(facts["start_token"])
        self.context = int(facts["context"])
        self.weight_bytes = int(facts["weight_bytes"])
        self.step_bytes = self.weight_bytes  # it neither has a draft nor is one

    def logits(self, tokens: Tokens, *, text: Tokens | None = None) -> Logits:
        """For the second half of windows (batch, length): (batch, length - length // 2, vocabulary); or for
        `text` (batch, targets) written of the whole."""
        given = halves(tokens) if text is None else (tokens, text)
        source, target = (each.astype(np.int64) for each in given)
        return self._answers(source, np.ones_like(source), target)

    def padded(self, texts: Sequence[Tokens], padding: int, *, left: bool = False) -> list[Logits]:
        """`logits` of texts of any lengths, their halves in one batch, sources padded on right or left."""
        sources, targets = zip(*(halves(text) for text in texts), strict=True)
        answers = self._answers(*padded_rows(sources, padding, left=left), padded_rows(targets, padding)[0])
        return [answer[: len(target)] for answer, target in zip(answers, targets, strict=True)]

    def prefill(self, tokens: Tokens) -> State:
        """Read sources (batch, length); the logits are those of the first token of the text."""
        source = tokens.astype(np.int64)
        read = self._encode(source, np.ones_like(source))
        start = np.full_like(source[:, :1], self._start)
        return self._next(read, self._nothing(len(source)), start, source.shape[1])

    def decode(self, state: State, tokens: Tokens) -> State:
        """Append one token per row, (batch,), to the text."""
        assert isinstance(state, Written)
        return self._next(state.source, state.text, tokens[:, None].astype(np.int64), state.length + 1)

    def join(self, parts: Sequence[tuple[State, int]]) -> State:
        """Refused, as `joins` says."""
        raise UserError("texts of an encoder-decoder are written one by one")

    def append(self, state: State, tokens: Tokens) -> tuple[State, Logits]:
        """Refused, as `rewinds` says."""
        raise UserError("an encoder-decoder cannot step back in its text; leave the draft out")

    def rewind(self, state: State, length: int) -> State:
        """Refused, as `rewinds` says."""
        raise UserError("an encoder-decoder cannot step back in its text; leave the draft out")

    def _next(self, source: Values, text: Values, tokens: Ids, length: int) -> Written:
        logits, text = self._decode(source, text, tokens)
        return Written(source, text, logits[:, -1], length)

    def _answers(self, source: Ids, mask: Ids, target: Ids) -> Logits:
        start = np.full_like(target[:, :1], self._start)
        text = np.concatenate([start, target[:, :-1]], axis=1)
        return self._decode(self._encode(source, mask), self._nothing(len(text)), text)[0]

    def _encode(self, source: Ids, mask: Ids) -> Values:
        """Keys and values of sources (batch, length), and their mask."""
        require_side(self.takes_left, mask)
        self._require_room(source.shape[1])
        self._files.require()
        given = {"input_ids": _value(source), "attention_mask": _value(mask)}
        return {"encoder_attention_mask": given["attention_mask"], **_run(self._encoder, given)}

    def _decode(self, source: Values, text: Values, tokens: Ids) -> tuple[Logits, Values]:
        """Logits (batch, length, vocabulary) after each of tokens (batch, length), and what is then kept."""
        self._files.require()
        past = next(iter(text.values())).shape()[2]
        self._require_room(past + tokens.shape[1])
        kept = _run(self._decoder, {"input_ids": _value(tokens), **source, **text})
        logits: Logits = kept.pop("logits").numpy()
        return logits, kept

    def _nothing(self, batch: int) -> Values:
        """Keys and values before there is a text."""
        return {
            name: _value(np.zeros((batch, heads, 0, width), np.float32))
            for name, (_, heads, _, width) in self._own.items()
        }

    def _require_room(self, length: int) -> None:
        if length > self.context:
            raise UserError(f"{length} tokens exceed the model's context of {self.context}")


def _value(array: Ids | Logits) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _run(session: onnxruntime.InferenceSession, given: Values) -> Values:
    """All outputs, keys and values by the names under which they are read again."""
    names = [output.name for output in session.get_outputs()]
    try:
        found = session.run_with_ort_values(names, given)
    except Exception as error:
        raise refused_at_run(error, DECODER if "logits" in names else ENCODER) from None
    return {name.replace(PRESENT, PAST): value for name, value in zip(names, found, strict=True)}
