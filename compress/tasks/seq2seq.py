"""How an encoder-decoder of `transformers` is asked: a source to the encoder, then token by token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.tasks.base import halves


@dataclass
class Reading:
    """A source that was read: what the encoder made of it, and keys and values of the text so far."""

    encoded: Any
    past: Any = None


def answers(model: Any, windows: Tensor) -> Tensor:
    """Logits (batch, targets, vocabulary) for the second halves of windows (batch, length)."""
    source, target = halves(windows)
    text = shifted(target, start_token(model))
    return model(input_ids=source, decoder_input_ids=text, use_cache=False).logits


def read(model: Any, source: Tensor) -> tuple[Reading, Tensor]:
    """Read sources (batch, length); the logits of the first token, (batch, vocabulary)."""
    reading = Reading(model.get_encoder()(input_ids=source))
    return reading, proceed(model, reading, source.new_full((len(source), 1), start_token(model)))


def proceed(model: Any, reading: Reading, tokens: Tensor) -> Tensor:
    """Append tokens (batch, 1) to what `reading` has so far; the logits of the next, (batch, vocabulary)."""
    out = model(
        encoder_outputs=reading.encoded,
        decoder_input_ids=tokens,
        past_key_values=reading.past,
        use_cache=True,
    )
    reading.past = out.past_key_values
    return out.logits[:, -1]


def shifted(targets: Tensor, start: int) -> Tensor:
    """What a decoder reads to give targets (batch, length): the start token and all but the last of them."""
    return torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1]], dim=1)


def start_token(model: Any) -> int:
    """What a decoder's text begins with."""
    start = getattr(model.config, "decoder_start_token_id", None)
    return int((model.config.pad_token_id if start is None else start) or 0)
