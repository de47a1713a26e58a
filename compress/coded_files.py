"""The codes of `Coded` matrices in a file: a stream in place of the bytes.

A tensor NAME.codes of the state is stored as `NAME.deflated` (formats/entropy_coding.py). Reading gives back
the state that was written.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from compress.errors import UserError
from compress.formats import Coded, QuantizedTensor
from compress.formats.entropy_coding import deflate, inflate
from compress.records import LayerRecord

STREAM = "deflated"  # the name in files of what is `codes` in memory
_CODES = "codes"


def deflated(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with streams for the codes whose format has them in files."""
    names = {
        f"{name}.{_CODES}": f"{name}.{STREAM}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedTensor) and isinstance(module.format, Coded)
    }
    return {
        names.get(name, name): deflate(tensor) if name in names else tensor for name, tensor in state.items()
    }


def inflated(state: Mapping[str, Tensor], layers: Mapping[str, LayerRecord], file: Path) -> dict[str, Tensor]:
    """Undo `deflated`.

    Args:
        state: what was read.
        layers: of the manifest: the shapes.
        file: to name in an error.

    Raises:
        UserError: a stream that is damaged, of another length, or of a layer that the manifest lacks.
    """
    result = {}
    for name, tensor in state.items():
        place, _, leaf = name.rpartition(".")
        if leaf != STREAM:
            result[name] = tensor
            continue
        record = layers.get(place.removesuffix(".quantized"))
        if record is None:
            raise UserError(f"{file}: '{name}' is of no layer of its manifest; write the artifact again")
        out, columns = record.shape
        try:
            codes = inflate(tensor, out * columns)
        except UserError as error:
            raise UserError(f"{file}: '{name}': {error}; write the artifact again") from None
        result[f"{place}.{_CODES}"] = codes.view(out, 1, columns)
    return result
