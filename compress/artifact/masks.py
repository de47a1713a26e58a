"""Masks on disk: what of the zeros of a matrix is kept.

A pruned weight is stored as a zero, and so is a kept one that a grid rounds to zero: read as "what is not 0"
a mask of 30 % became one of 46 % at 2 bits. So beside the zeros of a layer, whether they are in floats or in
codes, one bit each says whether the mask keeps it. A layer all of whose zeros are pruned needs none.

    masks.safetensors   NAME -> uint8 (ceil(zeros / 8),), in the order of rows of (out, in), the first lowest

Artifacts that were written before there was this file are read as then: their zeros are all pruned.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.artifact.coded import without_streams
from compress.artifact.shards import ShardReader
from compress.errors import UserError
from compress.formats import QuantizedLinear, QuantizedTensor
from compress.formats.packing import pack, packed_bytes, unpack
from compress.host.tensor_files import load_tensors
from compress.models.conv1d import StoredTransposed
from compress.models.layers import matrix
from compress.models.owned import own_tensors
from compress.records.manifest import LayerRecord

MASKS = "masks.safetensors"


def kept_zeros(mask: Tensor, weight: Tensor) -> Tensor | None:
    """Which zeros of a weight (out, in) its mask keeps, a bit each; None if it keeps none.

    >>> kept_zeros(torch.tensor([[True, True, False]]), torch.tensor([[2.0, 0.0, 0.0]])).tolist()
    [1]

    Raises:
        UserError: the mask prunes a weight that is not zero.
    """
    zero = weight == 0
    if bool((~mask & ~zero).any()):
        raise UserError("a mask prunes weights that are not 0; set them to 0, or leave the mask out")
    bits = mask[zero]
    return pack(bits.to(torch.uint8), 1) if bool(bits.any()) else None


def mask_of(weight: Tensor, bits: Tensor | None) -> Tensor:
    """Undo `kept_zeros`: bool (out, in).

    Raises:
        UserError: there are not as many bits as zeros.
    """
    mask = weight != 0
    if bits is not None:
        zero = ~mask
        count = int(zero.sum())
        if bits.dtype != torch.uint8 or bits.shape != (packed_bytes(count, 1),):
            raise UserError(f"{bits.numel()} bytes for {count} zeros")
        mask[zero] = unpack(bits, 1, count).bool()
    return mask


class StoredMasks(Mapping[str, Tensor]):
    """Masks of weights that are on disk: read when one is asked for.

    Args:
        reader: where the weights are.
        names: of linear layers -> whether their matrix is stored transposed, (in, out).
        bits: of the layers some of whose zeros are kept.
    """

    def __init__(
        self, reader: ShardReader, names: Mapping[str, bool], bits: Mapping[str, Tensor] | None = None
    ) -> None:
        self._reader, self._names, self.bits = reader, dict(names), dict(bits or {})

    def __getitem__(self, name: str) -> Tensor:
        """Bool (out, in)."""
        transposed, key = self._names[name], f"{name}.weight"
        weight = self._reader.read([key])[key]
        return _checked(name, weight.T if transposed else weight, self.bits.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading


def stored_masks(
    model: nn.Module, reader: ShardReader, names: Iterable[str], bits: Mapping[str, Tensor] | None = None
) -> StoredMasks:
    """Masks of the layers that `model` has of those named, read from files one by one."""
    modules, transposed = dict(model.named_modules()), {}
    for name in names:
        _require_layer(modules.get(name), name)
        transposed[name] = isinstance(modules[name], StoredTransposed)
    return StoredMasks(reader, transposed, bits)


def loaded_masks(model: nn.Module, names: Iterable[str], bits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the layers named, of a model that is in memory.

    Raises:
        UserError: one of them is no layer of the model, or a mask does not fit its layer.
    """
    modules = dict(model.named_modules())
    found = {}
    for name in names:
        _require_layer(modules.get(name), name)
        found[name] = _checked(name, matrix(modules[name]), bits.get(name))
    return found


def read_bits(folder: Path) -> dict[str, Tensor]:
    """What `write_bits` wrote; nothing where there is no such file."""
    file = folder / MASKS
    if not file.is_file():
        return {}
    return own_tensors(load_tensors(file))


def write_bits(
    masks: Mapping[str, Tensor],
    model: nn.Module,
    parts: Sequence[Path],
    layers: Mapping[str, LayerRecord],
    folder: Path,
) -> None:
    """Write the kept zeros of all masked layers, where there are any.

    Args:
        masks: by the names of linear layers.
        model: what is saved; layers without data are in `parts`.
        parts: safetensors files.
        layers: those of the model that hold codes.
        folder: of the artifact.

    Raises:
        UserError: a mask prunes a weight that is not zero.
    """
    stored: Callable[[str], Tensor] = _Stored(model, parts, layers)
    known, found = dict(model.named_modules()), {}
    for name in sorted(name for name in masks if name in known):
        try:
            bits = kept_zeros(masks[name].cpu(), stored(name).cpu())
        except UserError as error:
            raise UserError(f"masks: '{name}': {error}") from None
        if bits is not None:
            found[name] = bits
    if found:
        save_file(found, folder / MASKS, metadata={"format": "pt"})


class _Stored:
    """The matrices (out, in) of a model that is being saved, some of which are in files."""

    def __init__(self, model: nn.Module, parts: Sequence[Path], layers: Mapping[str, LayerRecord]) -> None:
        self.model, self.layers = model, layers
        self.reader = ShardReader(parts)

    def __call__(self, name: str) -> Tensor:
        module = self.model.get_submodule(name)
        held = module.quantized.codes if isinstance(module, QuantizedLinear) else module.weight
        assert isinstance(held, Tensor)
        if not held.is_meta:
            return matrix(module)
        if isinstance(module, QuantizedLinear):
            return self._codes(name, module.quantized)
        weight = self.reader.read([key := f"{name}.weight"])[key]
        return weight.T if isinstance(module, StoredTransposed) else weight

    def _codes(self, name: str, held: QuantizedTensor) -> Tensor:
        place = f"{name}.quantized."
        keys = [
            place + leaf for leaf in ("codes", "scales", "zeros", "stream") if place + leaf in self.reader
        ]
        state = without_streams(self.reader.read(keys), self.layers, Path(MASKS))
        whole = QuantizedTensor(held.format, held.shape)
        whole.load_state_dict({key.removeprefix(place): tensor for key, tensor in state.items()})
        return whole.dequantize()


def _require_layer(module: Any, name: str) -> None:
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise UserError(f"{MASKS}: '{name}' is masked, and no layer of the model; write the artifact again")


def _checked(name: str, weight: Tensor, bits: Tensor | None) -> Tensor:
    try:
        return mask_of(weight, bits)
    except UserError as error:
        raise UserError(
            f"{MASKS}: '{name}' does not fit its layer ({error}); write the artifact again"
        ) from None
