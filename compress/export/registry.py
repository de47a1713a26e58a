"""All layouts by name: the type of a pass's field `runtime`, and which of them a chain of passes ends in."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from compress.errors import nearest
from compress.export.compressed_tensors.sizes import CompressedTensorsLayout
from compress.export.gguf.sizes import GgufLayout
from compress.export.layout import Layout, TorchLayout
from compress.export.onnx.sizes import OnnxLayout

_Any = TorchLayout | OnnxLayout | GgufLayout | CompressedTensorsLayout
LAYOUTS: dict[str, type[Layout]] = {str(cls.model_fields["kind"].default): cls for cls in get_args(_Any)}


def _from_name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in LAYOUTS:
        raise ValueError(f"'{value}' is unknown; {nearest(value, LAYOUTS)}")
    return {"kind": value}


# In a recipe a runtime is `onnx`, or `{kind: onnx, widen: true}`.
if TYPE_CHECKING:
    Runtime = Layout
else:
    Runtime = Annotated[_Any, Field(discriminator="kind")]
Named = BeforeValidator(_from_name)


def runtime_of(wanted: Layout | None, written: Iterable[Layout], *, exactly: bool) -> Layout:
    """The layout that counts where exports in these layouts follow, with the export's settings.

    Args:
        wanted: what was asked for, if anything was.
        written: by the exports, in order.
        exactly: whether it must be one.

    Raises:
        ValueError: it must be one, and is not.
    """
    named = [layout for layout in dict.fromkeys(written) if wanted is None or layout.kind == wanted.kind]
    if wanted in named:
        assert wanted is not None
        return wanted
    if len(named) > 1 and exactly:
        kinds = " and ".join(layout.kind for layout in named)
        raise ValueError(
            f"runtime: exports for {kinds} follow, and the bytes can be those of one; set runtime: "
            f"{named[0].kind}, or give each a variant of its own"
        )
    return named[0] if named else wanted or TorchLayout()
