"""The weights of an artifact as bitmasks and values, where that is smaller.

A tensor NAME of the state is stored as `NAME.bitmask` and `NAME.values` (formats/sparse.py); the manifest
says its shape. What does not get smaller stays dense, in the same file. Floats that 16 bits hold exactly are
written in 16 bits: weights from such a checkpoint, pruned and otherwise left alone, take no more than they
did there. Reading gives back the state that was written.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.formats import QuantizedLinear, QuantizedTensor
from compress.formats.packing import unpack
from compress.formats.registry import format_from
from compress.formats.sparse import (
    SparseLinear,
    SparseQuantizedTensor,
    pack_codes,
    pack_floats,
    unpack_codes,
    unpack_floats,
)
from compress.models.conv1d import StoredTransposed
from compress.models.layers import is_linear, replace_module
from compress.records.manifest import LayerRecord, SparseRecord

SPARSE = "sparse.safetensors"
_CODES = ".quantized.codes"
_HEADER = 160  # bytes that a second tensor, and a line of the manifest, take at most


def compact(
    state: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, SparseRecord]]:
    """The state with the matrices of linear layers packed where that is smaller, and what was packed."""
    result = dict(state)
    records: dict[str, SparseRecord] = {}
    for name, matrix in _matrices(model):
        if name not in state:  # shared with another, or in a file already
            continue
        parts = pack_floats(state[name]) if matrix is None else pack_codes(matrix)
        if sum(_bytes(_narrow(part)) for part in parts) + _HEADER < _bytes(_narrow(state[name])):
            del result[name]
            result[f"{name}.bitmask"], result[f"{name}.values"] = parts
            records[name] = SparseRecord(shape=tuple(state[name].shape), stored=len(parts[1]))
    return {name: _narrow(tensor) for name, tensor in result.items()}, records


def widen(state: dict[str, Tensor], model: nn.Module) -> None:
    """Give every tensor of the state the type that it has in the model."""
    types = {name: tensor.dtype for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in state.items():
        state[name] = tensor.to(types.get(name, tensor.dtype))


def _narrow(tensor: Tensor) -> Tensor:
    """In 16 bits if they hold every value of a float32 tensor."""
    if tensor.dtype == torch.float32:
        for kind in (torch.bfloat16, torch.float16):
            if torch.equal(tensor.to(kind).float(), tensor):
                return tensor.to(kind)
    return tensor


def _matrices(model: nn.Module) -> Iterator[tuple[str, QuantizedTensor | None]]:
    """The names that linear layers' matrices have in a state, and their codes if they are such."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield f"{name}{_CODES}", module.quantized
        elif is_linear(module):
            yield f"{name}.weight", None


def expand(
    state: dict[str, Tensor],
    records: Mapping[str, SparseRecord],
    layers: Mapping[str, LayerRecord],
    file: Path,
) -> None:
    """Put the dense tensors in the place of bitmasks and values.

    Args:
        state: what was read; changed in place.
        records: of the manifest.
        layers: of the manifest: the formats of codes.
        file: to name in an error.

    Raises:
        UserError: parts that are missing or do not belong together.
    """
    for name, record in records.items():
        bitmask, values = _parts(state, name, record, file)
        state[name] = _dense(state, name, record, layers, file)
        del state[bitmask], state[values]


def keep_packed(
    model: nn.Module,
    state: dict[str, Tensor],
    records: Mapping[str, SparseRecord],
    layers: Mapping[str, LayerRecord],
    file: Path,
) -> None:
    """Give a model, into which the state is not loaded yet, layers that hold bitmasks and values.

    Arguments and errors as of `expand`.
    """
    for name, record in records.items():
        bitmask, values = (state.pop(part) for part in _parts(state, name, record, file))
        parts = {f"{name}.bitmask": bitmask, f"{name}.values": values}
        _dense({**state, **parts}, name, record, layers, file)  # damage is reported now, not in a call
        layer = name.removesuffix(_CODES)
        if layer != name:
            module = model.get_submodule(layer)
            assert isinstance(module, QuantizedLinear)
            old, place = module.quantized, f"{layer}.quantized"
            module.quantized = SparseQuantizedTensor(old.format, old.shape, bitmask, values)
        else:
            place = name.removesuffix(".weight")
            dense = model.get_submodule(place)
            transposed = isinstance(dense, StoredTransposed)
            bias = getattr(dense, "bias", None)
            replace_module(model, place, SparseLinear(bitmask, values, record.shape, bias, transposed))
        state |= {f"{place}.bitmask": bitmask, f"{place}.values": values}


def _parts(state: Mapping[str, Tensor], name: str, record: SparseRecord, file: Path) -> tuple[str, str]:
    """The names of the parts of a packed tensor, which are there, as many as the manifest says."""
    bitmask, values = f"{name}.bitmask", f"{name}.values"
    missing = next((part for part in (bitmask, values) if part not in state), None)
    if missing is not None:
        raise UserError(f"{file}: no '{missing}', which its manifest names; write the artifact again")
    if len(state[values]) != record.stored:
        raise UserError(
            f"{file}: '{name}' has {len(state[values])} values where its manifest says {record.stored}; "
            "write the artifact again"
        )
    return bitmask, values


def _dense(
    state: Mapping[str, Tensor],
    name: str,
    record: SparseRecord,
    layers: Mapping[str, LayerRecord],
    file: Path,
) -> Tensor:
    bitmask, values = state[f"{name}.bitmask"], state[f"{name}.values"]
    layer = name.removesuffix(_CODES)
    try:
        if layer == name:
            return unpack_floats(bitmask, values, record.shape)
        format, shape = format_from(layers[layer].format), layers[layer].shape
        groups = format.groups(shape[1])
        zeros = torch.full((shape[0], groups), format.zero, dtype=torch.uint8)
        if not format.symmetric:
            zeros = unpack(state[f"{layer}.quantized.zeros"], format.bits, groups)
        return unpack_codes(bitmask, values, zeros, format, shape)
    except (UserError, KeyError) as error:
        raise UserError(f"{file}: '{name}' is damaged ({error}); write the artifact again") from None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
