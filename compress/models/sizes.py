"""Sizes that a configuration asks for, held against the files beside it before a model is made of them.

A number in a text file costs nothing, what is made of it does: ten million layers take hours, a width of
2^24 takes more memory than there is. The weights are in the files, so a model can be no larger than these,
with a wide margin for weights that are packed (half a bit each) or shared between layers.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from compress.errors import UserError

_PER_BYTE = 64  # weights that a stored byte may stand for
_SPARE = 1 << 20  # weights that tiny models may have beside
_LAYERS = 256  # that may share their tensors
_DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers", "num_blocks", "depth",
)  # fmt: skip
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "n_embed", "embedding_size", "word_embed_proj_dim")
_INNER = (
    "intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "vocab_size",
)  # fmt: skip
_COUNTS = (
    "num_local_experts", "num_experts", "n_routed_experts", "num_attention_heads", "n_head", "n_heads",
    "num_key_value_heads", "num_labels", "type_vocab_size",
)  # fmt: skip
# whose blocks each hold a mask of positions x positions
_MASKED = {"gpt_neo": "max_position_embeddings", "gpt_bigcode": "n_positions", "gptj": "n_positions"}
_MASK_ELEMENTS = 1 << 30


def require_possible(
    config: Mapping[str, Any], place: object, tensors: int, size: int, *, sharing: int = _LAYERS
) -> None:
    """Refuse a configuration of a model that cannot be in its files.

    Args:
        config: as `config.json` has it, with others inside.
        place: of the configuration.
        tensors: how many the files hold.
        size: bytes of the files.
        sharing: layers that may have no tensors of their own; 0 in a format whose layers share none.

    Raises:
        UserError: names the field.
    """
    weights = _PER_BYTE * size + _SPARE
    for found in _inside(config):
        for field, value in found.items():
            if isinstance(value, float) and value != value:
                raise UserError(f"{place}: {field}: is not a number (NaN); copy the file again")
        depth = _most(found, _DEPTHS, max(sharing, tensors), place, f"{tensors:,} tensors")
        held = f"{size:,} bytes of weights"
        width = _most(found, _WIDTHS, weights, place, held)
        _most(found, _COUNTS, weights, place, held)
        for field in _INNER:
            inner = _most(found, (field,), weights, place, held)
            layers = 1 if field == "vocab_size" else depth
            if prod((layers, width, inner)) > weights:
                raise UserError(
                    f"{place}: {field}: {inner:,} rows, {width:,} wide, in {layers:,} layers are more than "
                    f"{held} can hold; is this the configuration of these files?"
                )
        positions = found.get(_MASKED.get(str(found.get("model_type")), ""))
        if isinstance(positions, int) and positions**2 > _MASK_ELEMENTS:
            raise UserError(f"{place}: {positions:,} positions, whose masks would not fit into memory")


def _most(config: Mapping[str, Any], fields: tuple[str, ...], limit: int, place: object, held: str) -> int:
    """The largest of these sizes, 1 where there is none; refused where it is beyond the limit."""
    sizes = {field: v for field in fields if type(v := config.get(field)) is int}
    for field, value in sizes.items():
        if value < 0:  # some functions take it for "what is left", and fail in the middle of a text
            raise UserError(f"{place}: {field}: {value:,} is no count; copy the file again")
        if value > limit:
            raise UserError(
                f"{place}: {field}: {value:,}, but there are {held}; is it the configuration of these files?"
            )
    return max([1, *sizes.values()])


def _inside(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configuration and those in it, of text and vision models."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _inside(value)
