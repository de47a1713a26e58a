"""An encoder-decoder (T5, BART) as two ONNX graphs, traced, with the codes it holds.

encoder_model.onnx   input_ids, attention_mask int64 (batch, sequence), the mask 0 where a row is padded, on
                     either side -> of every block of the decoder what it reads of the source,
                     present.I.encoder.key and .value (batch, heads, sequence, width). Runs once per text.
decoder_model.onnx   input_ids (batch, sequence), the text's next tokens; encoder_attention_mask (batch,
                     source); past_key_values.I.encoder.key and .value as the encoder gave them, and
                     past_key_values.I.decoder.key and .value (batch, heads, past, width) of the text so far,
                     past 0 where it begins -> logits (batch, sequence, vocabulary) and
                     present.I.decoder.key and .value (batch, heads, past + sequence, width).

The names are those of `optimum`, which has three graphs: what a decoder computes of the source once is a
graph of its own there, with the whole decoder in it again. Both graphs read one file of weights, in which
what they share (the token table) lies once. Heads that compute nothing are no part of them (closed_heads.py).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.export.onnx.architecture import Linear
from compress.export.onnx.closed_heads import without_closed_heads
from compress.export.onnx.encoder import layers
from compress.export.onnx.forms import Forms
from compress.export.onnx.graph import Dimensions, GraphBuilder
from compress.export.onnx.sides import Read, on_either_side
from compress.export.onnx.trace import trace
from compress.export.onnx.transcribe import transcribe
from compress.formats.swap import tables
from compress.host.progress import track
from compress.models.running import device_of
from compress.runtimes.onnx_session import DECODER, ENCODER, PAST, PRESENT, right_only
from compress.tasks.seq2seq import start_token

_TEXT: Dimensions = ("batch", "sequence")


def write_seq2seq(
    folder: Path, model: Any, forms: Forms, metadata: dict[str, str]
) -> tuple[list[Linear], int, bool, int]:
    """Write both graphs; returns the layers they have, the bytes of their weights, whether sources may be
    padded on the left, and how many closed heads were left out.

    Raises:
        UserError: torch cannot trace it; a group of codes that no kernel takes.
    """
    model, closed = without_closed_heads(model)
    held, looked_up = layers(model), tables(model)
    kind = str(model.config.model_type)
    heads = {layer.name for name, layer in held.items() if name not in looked_up}
    sizes = _cache_sizes(model)
    read = _cache(PRESENT, "encoder", sizes, "sequence")
    reading: dict[str, Dimensions] = {"input_ids": _TEXT, "attention_mask": _TEXT}
    written = _cache(PRESENT, "decoder", sizes, "total")
    writing: dict[str, Dimensions] = {
        "input_ids": _TEXT,
        "encoder_attention_mask": ("batch", "source"),
        **_cache(PAST, "encoder", sizes, "source"),
        **_cache(PAST, "decoder", sizes, "past"),
    }
    with track(4, "writing the graphs", "stages") as progress:
        with GraphBuilder(folder, ENCODER) as encoder:
            encode, either = on_either_side(model.get_encoder(), _encode, list(reading))
            metadata = metadata | right_only(either)
            traced = trace(model, reading, read, partial(_read, encode))
            progress.advance()
            used = transcribe(encoder, traced, held, replace(forms, many_rows=True), reading | read, heads)
            encoder.save(kind, metadata)
            progress.advance()
        with GraphBuilder(folder, DECODER, after=encoder) as decoder:
            traced = trace(model, writing, ["logits", *written], _write, cached=True)
            progress.advance()
            used += transcribe(decoder, traced, held, forms, writing | written, heads)
            weight_bytes = encoder.weight_bytes + decoder.weight_bytes
            decoder.save(kind, metadata | {"weight_bytes": str(weight_bytes)})
            progress.advance()
    return used, weight_bytes, either, closed


def _cache(prefix: str, side: str, sizes: list[tuple[int, int]], length: str) -> dict[str, Dimensions]:
    """Names and shapes of every block's keys and values."""
    return {
        f"{prefix}.{index}.{side}.{kind}": ("batch", heads, length, width)
        for index, (heads, width) in enumerate(sizes)
        for kind in ("key", "value")
    }


def _cache_sizes(model: Any) -> list[tuple[int, int]]:
    """(heads, width) of each block's keys, as one token leaves them."""
    one = torch.full((1, 1), start_token(model), device=device_of(model))
    with torch.no_grad():
        past = model(input_ids=one, decoder_input_ids=one, use_cache=True).past_key_values
    kept = past.self_attention_cache.layers
    return [(int(layer.keys.shape[1]), int(layer.keys.shape[3])) for layer in kept]


def _encode(encoder: Any, given: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states of a source."""
    states: Tensor = encoder(**given, return_dict=False)[0]
    return states


def _read(encode: Read, model: Any, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What the decoder keeps of a source when it writes a first token; the rest of what it does is left out
    of the graph, since no output depends on it."""
    encoded = encode(model.get_encoder(), given)
    first = torch.full_like(given["input_ids"][:, :1], start_token(model))
    past = model(
        encoder_outputs=(encoded,),
        attention_mask=given["attention_mask"],
        decoder_input_ids=first,
        use_cache=True,
    ).past_key_values
    return _held(past.cross_attention_cache)


def _write(model: Any, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    from transformers import EncoderDecoderCache

    mask = given["encoder_attention_mask"]
    # asked for its size only: what comes of the source is in the cache
    encoded = mask[..., None].expand(-1, -1, int(model.config.hidden_size)).float()
    out = model(
        encoder_outputs=(encoded,),
        attention_mask=mask,
        decoder_input_ids=given["input_ids"],
        past_key_values=EncoderDecoderCache(_filled(given, "decoder"), _filled(given, "encoder")),
        use_cache=True,
    )
    return out.logits, *_held(out.past_key_values.self_attention_cache)


def _filled(given: Mapping[str, Tensor], side: str) -> Any:
    """A cache that holds what a graph was given."""
    from transformers import DynamicCache

    cache = DynamicCache()
    tensors = [tensor for name, tensor in given.items() if f".{side}." in name]
    for index, (keys, values) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
        cache.update(keys, values, index)
    return cache


def _held(cache: Any) -> tuple[Tensor, ...]:
    """Keys and values of each block, in the order of `_cache`."""
    return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
