"""Bytes and parameters of a model and of its weight files, what is shared counted once."""

from math import prod
from pathlib import Path

from torch import Tensor, nn

from compress.artifact.folder import CODES
from compress.artifact.integrity import sha256_of
from compress.artifact.sparse import SPARSE
from compress.formats import QuantizedTensor
from compress.formats.sparse import SparseLinear
from compress.models.checkpoints import weight_files
from compress.records.manifest import FileRecord


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor once, under the first name it has."""
    seen: set[tuple[int, int]] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:  # in a file already
            continue
        # tensors without elements share the null pointer
        key = (tensor.data_ptr(), tensor.numel()) if tensor.numel() else (id(tensor), 0)
        if key not in seen:
            seen.add(key)
            state[name] = tensor.detach().contiguous()
    return state


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights as held in memory, tied ones counted once."""
    return sum(t.numel() * t.element_size() for t in unique_state(model).values())


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(parameters, those that are not zero); a code counts as the weight it stands for, tied ones once."""
    total = nonzero = 0
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantizedTensor) and id(module) not in seen:
            seen.add(id(module))
            total += module.shape[0] * module.shape[1]
            nonzero += int(module.dequantize().count_nonzero())
        if isinstance(module, SparseLinear):
            total += prod(module.shape)
            nonzero += int(module.values.count_nonzero())
    for parameter in model.parameters():  # yields tied ones once
        total += parameter.numel()
        nonzero += int(parameter.count_nonzero())
    return total, nonzero


def weight_file_bytes(folder: Path) -> int:
    """Bytes of the weight files of an artifact or Hugging Face directory, scales and headers and all."""
    return sum(p.stat().st_size for p in code_files(folder) or weight_files(folder))


def code_files(folder: Path) -> list[Path]:
    """The files of an artifact in a layout of our own (codes, bitmasks), none if others can load it."""
    return sorted([*folder.glob(f"{Path(CODES).stem}*.safetensors"), *folder.glob(SPARSE)])


def file_record(path: Path) -> FileRecord:
    """Length and SHA-256 of a file, as they are read from the disk."""
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
