"""The smaller model: what is kept of every parameter, under a configuration that says so.

Nothing is cut in place. The kept entries are copied into a new model, made from the new configuration as
stock `from_pretrained` makes it, so what cannot be said in that configuration cannot come out. It holds one
number per kind for the whole model: key-value heads, query heads, neurons, width; BART's holds two, which
stay equal. Most architectures also derive the width of a head from width and heads; where no field can hold
it (GPT-2, OPT, BERT, BART), heads and width can only go together. Rotary tables depend on the width of a head
alone, which never changes.
"""

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.models.checkpoints import quiet_transformers
from compress.models.conv1d import of_config
from compress.models.running import device_of
from compress.models.tying import tied_like
from compress.structured.structure import Part, Structure

# what configurations call the width of the MLP
_NEURONS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "hidden_dim",
    "ffn_hidden_size",
    "d_ff",
    "encoder_ffn_dim",
)
_WIDTHS = ("hidden_size", "word_embed_proj_dim")
_HEAD_WIDTHS = {"head_dim", "d_kv"}
_OF_DECODER = {"neurons": "decoder_ffn_dim", "heads": "decoder_attention_heads"}  # beside an encoder's own

# parameter -> axes, and the entries that are kept of each, ascending
Cuts = Mapping[str, Sequence[tuple[int, Tensor]]]


@dataclass(frozen=True)
class UnitCounts:
    """How many are kept: units per block, and channels of the stream."""

    heads: int
    neurons: int
    width: int

    @classmethod
    def of(cls, structure: Structure) -> "UnitCounts":
        """Those of the whole model."""
        return cls(structure.units("heads"), structure.units("neurons"), structure.width)


@dataclass(frozen=True)
class Kept:
    """Which units stay: of every reader by its name, of the stream, and of layers inside heads, one after the
    other, where the stream loses any; all ascending."""

    units: Mapping[str, Tensor]
    stream: Tensor
    inside_heads: Sequence[Tensor] = ()


def smaller_config(config: Any, structure: Structure, counts: UnitCounts) -> Any:
    """The configuration of a model that keeps `counts`; `config` stays as it is.

    Raises:
        UserError: the counts cannot be said in a configuration of this kind.
    """
    known = inspect.signature(type(config)).parameters
    whole, new = UnitCounts.of(structure), copy.deepcopy(config)
    heads = config.num_attention_heads
    head = structure.width // heads
    if counts.heads != whole.heads:
        new.num_attention_heads = heads // whole.heads * counts.heads
        if _OF_DECODER["heads"] in known:
            setattr(new, _OF_DECODER["heads"], new.num_attention_heads)
        if "num_key_value_heads" in known:
            new.num_key_value_heads = counts.heads
    if counts.width != whole.width:
        for name in _WIDTHS:
            if getattr(config, name, None) == whole.width:
                setattr(new, name, counts.width)
    if counts.heads != whole.heads or counts.width != whole.width:
        own = getattr(config, "head_dim", None)
        if (_HEAD_WIDTHS | {"num_key_value_heads"}) & known.keys():
            new.head_dim = own or head
        elif counts.width != new.num_attention_heads * head:
            raise UserError(
                f"prune_structured: model_type '{config.model_type}' has no field for the width of a head: "
                f"{counts.heads} heads of {head} need a width of {counts.heads * head}, not {counts.width}; "
                "give heads and width the same share, or prune neurons only"
            )
    if counts.neurons != whole.neurons or counts.width != whole.width:  # some derive one from the other
        field = next((name for name in _NEURONS if name in known), None)
        if field is None:
            raise UserError(
                f"prune_structured: it is not known where model_type '{config.model_type}' keeps its number "
                "of neurons; take out heads or blocks only"
            )
        setattr(new, field, counts.neurons)
        if _OF_DECODER["neurons"] in known:
            setattr(new, _OF_DECODER["neurons"], counts.neurons)
    try:
        new.validate()
    except Exception as error:  # what is wrong is the last line of a chain of validators
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"prune_structured: model_type '{config.model_type}' cannot have {counts.heads} key-value heads, "
            f"{counts.neurons} neurons and a width of {counts.width} ({reason}); choose other shares"
        ) from None
    return new


def possible(config: Any, structure: Structure, counts: UnitCounts) -> bool:
    """Whether a stock configuration can hold the counts."""
    try:
        smaller_config(config, structure, counts)
    except UserError:
        return False
    return True


def slice_model(model: Any, structure: Structure, counts: UnitCounts, kept: Kept) -> Any:
    """A new model of what is kept, in eval mode; the one given stays as it is.

    Raises:
        UserError: the configuration makes a model of other shapes.
    """
    config = smaller_config(model.config, structure, counts)
    return assembled(model, config, cut(held(model), cuts_of(structure, kept)))


def cuts_of(structure: Structure, kept: Kept) -> Cuts:
    """What is kept of the parameters that do not stay whole."""
    cuts: dict[str, list[tuple[int, Tensor]]] = {}

    def add(parts: Iterable[Part], units: Tensor) -> None:
        for part in parts:
            if len(units) < len(part.entries):
                entries = part.entries[units].flatten().sort().values
                cuts.setdefault(part.parameter, []).append((part.axis, entries))

    for sublayer in structure.sublayers:
        add(sublayer.parts, kept.units[sublayer.reader])
    add(structure.stream, kept.stream)
    if len(kept.stream) < structure.width:
        for parts, channels in zip(structure.inside_heads, kept.inside_heads, strict=True):
            add(parts, channels)
    return cuts


def cut(tensors: Mapping[str, Tensor], cuts: Cuts) -> dict[str, Tensor]:
    """What is kept of parameters, by name."""
    return {name: _cut(tensor, cuts.get(name, ())) for name, tensor in tensors.items()}


def cut_masks(masks: Mapping[str, Tensor], cuts: Cuts) -> dict[str, Tensor]:
    """What is kept of the masks (out, in) of linear layers, as `cut` takes it of their weights."""
    return {name: _cut(mask, cuts.get(f"{name}.weight", ())) for name, mask in masks.items()}


def _cut(tensor: Tensor, cuts: Iterable[tuple[int, Tensor]]) -> Tensor:
    for axis, entries in cuts:
        tensor = tensor.index_select(axis, entries.to(tensor.device))
    return tensor


def held(model: Any) -> dict[str, Tensor]:
    """What a model is saved as, the way it lies in the model: parameters, tied ones once, and buffers."""
    stored = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return {**dict(model.named_parameters()), **buffers}


@torch.no_grad()
def assembled(model: Any, config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A model of a configuration that holds these tensors, named as `held` names them."""
    from transformers.initialization import no_init_weights

    try:
        with quiet_transformers(), no_init_weights():
            result = of_config(
                config, dtype=torch.float32, attn_implementation=model.config._attn_implementation
            )
        result.tie_weights()
        tied_like(result, model)
        targets = held(result)
        if other := sorted(targets.keys() ^ tensors.keys()):
            raise ValueError(f"{other[0]} is in one of the two only")
        for name, tensor in tensors.items():
            if tensor.shape != targets[name].shape:
                raise ValueError(f"{name} is {tuple(targets[name].shape)}, not {tuple(tensor.shape)}")
            targets[name].copy_(tensor)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"model_type '{config.model_type}' makes no model of this shape "
            f"({str(error).strip().splitlines()[-1].strip()}); prune other parts"
        ) from None
    if result.can_generate():
        result.generation_config = copy.deepcopy(model.generation_config)
    return result.to(device_of(model)).eval()
