"""A checkpoint's model without its weights, if its files can be read block by block.

That takes files that hold every parameter under the name it has in the model, and nothing that the model has
no place for: then one at a time is what all at once would be. Else (names that `transformers` translates,
weights that it takes apart) the model is loaded whole, if it fits.
"""

from pathlib import Path
from typing import Any

import torch

from compress.artifact.shards import ShardReader, skeleton
from compress.errors import UserError
from compress.host.memory import available_memory_bytes
from compress.models.checkpoints import (
    check_directory,
    load_config,
    loading,
    weight_files,
    with_generation_settings,
)
from compress.models.stored import require_kinds, stored_kinds
from compress.models.tying import untie
from compress.models.unused import in_float, quantization, unused
from compress.tasks.registry import task_of

_FLOAT32 = 4  # bytes


def streamed(folder: Path) -> tuple[Any, ShardReader] | None:
    """The model, parameters on the meta device, and where they are; None where it has to be loaded whole.

    Raises:
        UserError: as `check_directory`; the files cannot be streamed, and the model does not fit in memory.
    """
    config = load_config(folder)
    with loading(f"{folder / 'config.json'}: no model can be made of it"):
        # an encoder-decoder's blocks lie in two lists; a store of blocks knows one
        if task_of(config).stacks != 1:
            return None
        check_directory(folder)
        method = quantization(config)
        model = skeleton(in_float(config, folder))
    reader = ShardReader(weight_files(folder))
    refused = _refused(model, reader) if method is None else f"its weights are stored as {method}"
    if refused is not None:
        need = sum(_FLOAT32 * parameter.numel() for parameter in model.parameters())
        if need > available_memory_bytes():
            raise UserError(
                f"{folder}: cannot be streamed ({refused}), and whole it takes {need / 1e9:.1f} GB, more "
                "than is free; use a machine with more memory"
            )
        return None
    require_kinds(model, stored_kinds(weight_files(folder)), folder, shapes=refused is None)
    with torch.no_grad():
        stored = {name: buffer for name, buffer in model.state_dict().items() if not buffer.is_meta}
        for name, value in reader.read(name for name in stored if name in reader).items():
            stored[name].copy_(value)
    untie(model, reader.apart(model.all_tied_weights_keys))
    return with_generation_settings(model, folder), reader


def _refused(model: Any, reader: ShardReader) -> str | None:
    """Why the files cannot be read piece by piece."""
    if left := unused(model, reader):
        return f"nothing in the model is called '{left[0]}'"
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    missing = next((same[0] for same in names.values() if not any(name in reader for name in same)), None)
    return None if missing is None else f"no tensor is called '{missing}'"
