"""Whatever was written loads again, or `save` fails: the folder is opened before it counts.

Method. A small artifact is loaded as anybody would load it: every tensor and every mask must be the one in
memory, bit for bit. Of a large one every tensor is compared with what was handed to the writer: name, type,
shape and the ends of its data (artifact/written.py); its headers are held against the model of its
configuration, and its tokenizer is loaded. The hashes in the manifest are those of the files as they were
read back.
Cost: what loading takes; for a large one three short readings per tensor, and its tokenizer.
Limits: of a large float model whose tensors `transformers` renames, those with the same name and the number
of weights are compared; its masks are not.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact.coded import STREAM
from compress.artifact.counts import code_files, unique_state, weight_file_bytes
from compress.artifact.restored import make_room
from compress.artifact.streamed import streamed
from compress.artifact.written import require_saved, require_written
from compress.errors import UserError
from compress.models.checkpoints import check_directory, load_config, tokenizer_of, weight_files
from compress.models.conv1d import of_config
from compress.models.stored import require_kinds, stored_kinds
from compress.records.manifest import Manifest

_WHOLE = 1 << 26  # bytes of weights up to which all are compared


def require_reopens(
    model: Any,
    masks: Mapping[str, Tensor],
    folder: Path,
    manifest: Manifest,
    load: Callable[..., Any],
    written: Mapping[str, Tensor] | None,
    parts: Sequence[Path] = (),
) -> None:
    """Open what was written and compare.

    Args:
        model: what was saved; parts of it may be in files only.
        masks: what was saved with it.
        folder: where to.
        manifest: of the folder.
        load: `Bundle.load`.
        written: what was handed to the writer, by its names in the files; None where `transformers` wrote.
        parts: files whose tensors were joined to it.

    Raises:
        UserError: it does not load, or is another model.
    """
    try:
        if weight_file_bytes(folder) <= _WHOLE:
            found = load(folder, verify=False)
            _require_same(unique_state(model), found.model.state_dict(), folder)
            _require_same(masks, found.masks, folder)
            return
        files = code_files(folder) or list(weight_files(folder))
        if written is None:
            require_saved(model, files, folder)
        else:
            require_written(written, parts, files, folder)
        if manifest.layers or manifest.storage != "dense":
            model = _same_headers(folder, manifest)
        else:
            check_directory(folder)
            streamed(folder)
        tokenizer_of(model, folder)
    except UserError as error:
        raise UserError(f"what was written is not what was to be saved: {error}") from None


def _require_same(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], folder: Path) -> None:
    for name, tensor in wanted.items():
        other = found.get(name)
        if other is None or not _equal(tensor.detach().cpu(), other.detach().cpu()):
            raise UserError(f"{folder}: '{name}' does not come back as it was written; please report it")


def _equal(left: Tensor, right: Tensor) -> bool:
    if left.is_floating_point() and right.is_floating_point():
        return torch.equal(left.float(), right.float())
    return torch.equal(left, right)


def _same_headers(folder: Path, manifest: Manifest) -> Any:
    """The model of an artifact of codes, without data, with whose state its headers agree."""
    with torch.device("meta"):
        model = of_config(load_config(folder), dtype=torch.float32)
        make_room(model, manifest.layers)
    kinds = stored_kinds(code_files(folder))
    if manifest.storage == "dense" and not any(name.endswith(f".{STREAM}") for name in kinds):
        require_kinds(model, kinds, folder, shapes=True)
        own: dict[int, set[str]] = {}  # of each tensor, all names
        for name, tensor in model.state_dict(keep_vars=True).items():
            own.setdefault(id(tensor), set()).add(name)
        if left := sorted(kinds.keys() - set().union(*own.values())):
            raise UserError(f"{folder}: nothing in the model takes '{left[0]}'; please report it")
        if lacking := [min(names) for names in own.values() if not names & kinds.keys()]:
            raise UserError(f"{folder}: lacks '{lacking[0]}'; please report it")
    return model
