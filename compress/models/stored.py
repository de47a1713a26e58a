"""Do the files hold numbers of the kinds and shapes that the model has places for?

`transformers` and `load_state_dict` convert what they find: a weight whose header says I32 becomes 3.2e9, and
nothing is said. So headers are compared with the model: what it computes with is stored as floats, indices as
integers, and where names are those of the model the shapes are its shapes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import UserError
from compress.host.tensor_files import entries
from compress.models.unused import unused

_FLOATS = ("F", "BF")  # F32, F16, BF16, F8_E4M3 ...


class StoredTensor(NamedTuple):
    """What a header says of a tensor: `F32`, `I64` ..., and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """Whether its values are floating-point numbers."""
        return self.dtype.startswith(_FLOATS)


def stored_kinds(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """What the headers of safetensors files say of each tensor; nothing of the data is read."""
    found = [entry for file in files for entry in entries(file)]
    return {entry.name: StoredTensor(entry.dtype, tuple(entry.shape)) for entry in found}


def require_kinds(
    model: Any, kinds: Mapping[str, StoredTensor], place: object, *, shapes: bool = False
) -> None:
    """Refuse a checkpoint whose tensors are of other kinds than the model's.

    Args:
        model: of the checkpoint's configuration; it may be without data.
        kinds: what its files hold.
        place: to name in an error.
        shapes: compare shapes, too; else whoever loads does.

    Raises:
        UserError: names the first integer where a float is wanted, or the reverse, or another shape.
    """
    own = dict(model.state_dict(keep_vars=True))
    integers = [name for name, kind in kinds.items() if not kind.is_float]
    # under another name than in the files, whatever is not on a list of those left out is computed with
    wrong = {name for name in integers if name in own and own[name].is_floating_point()}
    wrong |= set(unused(model, (name for name in integers if name not in own)))
    for name in sorted(wrong):
        raise UserError(
            f"{place}: '{name}' is stored as {kinds[name].dtype}, integers, where the model computes with "
            "floats; the file is damaged, or its weights are quantized in a way that is not read here"
        )
    for name, kind in kinds.items():
        if name not in own:
            continue
        if kind.is_float and not own[name].is_floating_point():
            raise UserError(
                f"{place}: '{name}' is stored as {kind.dtype} where the model has {own[name].dtype}; "
                "the file is damaged: copy it again"
            )
        if shapes and kind.shape != tuple(own[name].shape):
            raise UserError(
                f"{place}: '{name}' is {list(kind.shape)} in the files and {list(own[name].shape)} by the "
                "configuration; copy both again"
            )
