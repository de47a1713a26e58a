"""Matrices of a format that is written as a stream: one in place of codes and scales.

What a state has as NAME.codes and NAME.scales is stored as `NAME.stream`, as the format writes it. Reading
gives back the state that was written.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from compress.errors import UserError
from compress.formats import QuantizedTensor
from compress.formats.registry import format_from
from compress.records.manifest import LayerRecord

STREAM = "stream"
_CODES, _SCALES = "codes", "scales"


def with_streams(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with streams for the matrices whose format has them in files."""
    result = dict(state)
    for name, module in model.named_modules(remove_duplicate=False):
        if not (isinstance(module, QuantizedTensor) and module.format.streamed):
            continue
        if (codes := result.pop(f"{name}.{_CODES}", None)) is not None:
            scales = result.pop(f"{name}.{_SCALES}")
            result[f"{name}.{STREAM}"] = module.format.to_stream(codes[:, 0], scales)
    return result


def without_streams(
    state: Mapping[str, Tensor], layers: Mapping[str, LayerRecord], file: Path
) -> dict[str, Tensor]:
    """Undo `with_streams`.

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
            codes, scales = format_from(record.format).from_stream(tensor, (out, columns))
        except UserError as error:
            raise UserError(f"{file}: '{name}': {error}; write the artifact again") from None
        result |= {f"{place}.{_CODES}": codes.view(out, 1, columns), f"{place}.{_SCALES}": scales}
    return result
