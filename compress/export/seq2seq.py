"""An encoder-decoder (T5, BART) as two ONNX graphs, traced, with the codes it holds.

encoder_model.onnx   input_ids, attention_mask int64 (batch, sequence), the mask 0 where a row is padded on
                     the right -> last_hidden_state (batch, sequence, width). Runs once per text.
decoder_model.onnx   input_ids (batch, sequence), the start token and the text so far; what the encoder read
                     and gave, encoder_attention_mask (batch, source) and encoder_hidden_states (batch,
                     source, width) -> logits (batch, sequence, vocabulary).

Names and shapes are those of `optimum`. Both graphs read one file of weights, in which what they share (the
token table) lies once. The decoder keeps no keys and values: every token reads the text so far again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.export.architecture import Linear
from compress.export.encoder import layers
from compress.export.graph import GraphBuilder, Shape
from compress.export.linear import Forms
from compress.export.trace import trace
from compress.export.transcribe import transcribe
from compress.formats.swap import tables
from compress.runtimes.onnx_session import DECODER, ENCODER

_TEXT: Shape = ("batch", "sequence")


def write_seq2seq(
    folder: Path, model: Any, forms: Forms, metadata: dict[str, str]
) -> tuple[list[Linear], int]:
    """Write both graphs; returns the layers they have and the bytes of their weights.

    Raises:
        UserError: torch cannot trace it; a group of codes that no kernel takes.
    """
    held, looked_up = layers(model), tables(model)
    kind = str(model.config.model_type)
    heads = {layer.name for name, layer in held.items() if name not in looked_up}
    reading: dict[str, Shape] = {"input_ids": _TEXT, "attention_mask": _TEXT}
    writing: dict[str, Shape] = {
        "input_ids": _TEXT,
        "encoder_attention_mask": ("batch", "source"),
        "encoder_hidden_states": ("batch", "source", int(model.config.hidden_size)),
    }
    with GraphBuilder(folder, ENCODER) as encoder:
        traced = trace(model, reading, "last_hidden_state", _encode)
        used = transcribe(encoder, traced, held, forms, reading, heads)
        encoder.save(kind, metadata)
    with GraphBuilder(folder, DECODER, after=encoder) as decoder:
        traced = trace(model, writing, "logits", _decode)
        used += transcribe(decoder, traced, held, forms, writing, heads)
        weight_bytes = encoder.weight_bytes + decoder.weight_bytes
        decoder.save(kind, metadata | {"weight_bytes": str(weight_bytes)})
    return used, weight_bytes


def _encode(model: Any, given: Mapping[str, Tensor]) -> Any:
    return model.get_encoder()(**given, return_dict=False)[0]


def _decode(model: Any, given: Mapping[str, Tensor]) -> Any:
    return model(
        encoder_outputs=(given["encoder_hidden_states"],),
        attention_mask=given["encoder_attention_mask"],
        decoder_input_ids=given["input_ids"],
        use_cache=False,
        return_dict=False,
    )[0]
