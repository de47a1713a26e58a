"""seq2seq: an encoder-decoder (T5, BART): a source to the encoder, then a text token by token.

A window asks for its second half, each token from the whole first half and those of the second before it. A
labelled row asks for its target, each token from the whole source and those of the target before it; there
the model is judged by the text that it writes, too (written.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from compress.tasks.base import Example, Question, Task, Window, require_row, rows_of
from compress.tasks.scoring import Scoring
from compress.tasks.written import Written

if TYPE_CHECKING:
    from torch import Tensor

_START = "decoder_start_token_id"
T = TypeVar("T", bound=Any)  # an array or a tensor


class Seq2Seq(Task):
    """To answer text."""

    name: ClassVar[str] = "seq2seq"
    noun: ClassVar[str] = "an encoder-decoder"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    writes: ClassVar[bool] = True
    stacks: ClassVar[int] = 2
    labels: ClassVar[str | None] = "text"
    scoring: ClassVar[Scoring] = Written()

    def claims(self, config: Any, architecture: str) -> bool:
        """Whatever its head is called."""
        return bool(getattr(config, "is_encoder_decoder", False))

    def question(self, window: Window, index: int, mask_token: int | None = None) -> Question:
        """The second half."""
        return Question(window, slice(None), halves(window)[1])

    def asked(self, example: Example) -> Question:
        """The whole target."""
        return Question(example.ids, slice(None), example.targets, text=example.targets)

    def answers(self, model: Any, tokens: Tensor, **more: Tensor) -> Tensor:
        """Logits (batch, targets, vocabulary) for the second halves of tokens (batch, length), or for `text`
        (batch, targets) where that is among `more`."""
        source, target = (tokens, more.pop("text")) if "text" in more else halves(tokens)
        text = shifted(target, start_token(model))
        logits: Tensor = model(input_ids=source, decoder_input_ids=text, use_cache=False, **more).logits
        return logits


SEQ2SEQ = Seq2Seq()


@dataclass
class Reading:
    """A source that was read: what the encoder made of it, its mask where it is padded, and keys and values
    of the text so far."""

    encoded: Any
    past: Any = None
    mask: Any = None


def halves(windows: T) -> tuple[T, T]:
    """What an encoder-decoder reads of windows (..., length), arrays or tensors, and what it is to give."""
    middle = windows.shape[-1] // 2
    return windows[..., :middle], windows[..., middle:]


def read(model: Any, source: Tensor, mask: Tensor | None = None) -> tuple[Reading, Tensor]:
    """Read sources (batch, length), padded where `mask` is 0; the logits of the first token, (batch,
    vocabulary)."""
    reading = Reading(model.get_encoder()(input_ids=source, attention_mask=mask), mask=mask)
    return reading, proceed(model, reading, source.new_full((len(source), 1), start_token(model)))


def proceed(model: Any, reading: Reading, tokens: Tensor) -> Tensor:
    """Append tokens (batch, 1) to what `reading` has so far; the logits of the next, (batch, vocabulary)."""
    out = model(
        encoder_outputs=reading.encoded,
        attention_mask=reading.mask,
        decoder_input_ids=tokens,
        past_key_values=reading.past,
        use_cache=True,
    )
    reading.past = out.past_key_values
    return out.logits[:, -1]


def shifted(targets: Tensor, start: int) -> Tensor:
    """What a decoder reads to give targets (batch, length): the start token and all but the last of them."""
    text = targets.roll(1, dims=1)  # a copy
    text[:, 0] = start
    return text


def start_token(model: Any) -> int:
    """What a decoder's text begins with; raises UserError where the model has no row for it."""
    field = "pad_token_id" if getattr(model.config, "decoder_start_token_id", None) is None else _START
    start = int(getattr(model.config, field, None) or 0)
    return require_row(start, rows_of(model.config), f"config.json: {field}")
