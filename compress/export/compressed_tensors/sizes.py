"""What compressed-tensors takes of codes, and what they weigh there (export/compressed_tensors/artifact.py).

Codes of a row fill whole words of 32 bits; a scale is a float16, the shape two int64. Grids are symmetric:
zero-points load only where all layers share one scheme, and the choice is among several. Layers that vLLM
makes one of (q, k, v; gate and up) have one format, or it could not load them. Token tables, and a head that
is tied to one, are stored as float, so they stay float.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import MissingExtra
from compress.export.layout import WIDTHS, Layout, Weigher
from compress.formats import Format

if TYPE_CHECKING:
    from compress.artifact.bundle import Bundle

_SHAPE_BYTES = 16  # of `weight_shape`


class CompressedTensorsLayout(Layout):
    """The folder `compressed-tensors/`."""

    bits: ClassVar[tuple[int, ...]] = (4, 8)  # that vLLM has kernels for
    groups: ClassVar[tuple[int, ...]] = (64, 32, 128)
    symmetric: ClassVar[bool] = True
    tables: ClassVar[bool] = False
    noted: ClassVar[bool] = False

    kind: Literal["compressed-tensors"] = "compressed-tensors"
    dtype: Literal["float16", "float32"] = Field("float16", description="as export_compressed_tensors.dtype")
    runtimes: tuple[Literal["transformers", "vllm"], ...] = Field(
        ("transformers", "vllm"), description="as export_compressed_tensors.runtimes"
    )

    def widths(self) -> tuple[int, ...]:
        """vLLM's, or all of them for transformers alone."""
        return self.bits if "vllm" in self.runtimes else WIDTHS

    def objection(self, format: Format, columns: int) -> str | None:
        """Groups that do not divide a row."""
        if format.groups(columns) == 1 or columns % format.group_width(columns) == 0:
            return None
        return (
            f"compressed-tensors wants groups that divide a row, and {format.group} does not; set group to "
            "a number that does, or leave such layers float (skip)"
        )

    def together(self, names: Sequence[str]) -> list[list[str]]:
        """Sets of layers that vLLM makes one of."""
        from compress.export.compressed_tensors.artifact import FUSED

        sets: dict[str, list[str]] = {}
        for name in names:
            block, _, leaf = name.rpartition(".")
            fused = next((parts[0] for parts in FUSED if leaf in parts), leaf)
            sets.setdefault(f"{block}.{fused}", []).append(name)
        return list(sets.values())

    def stored(self, format: Format, shape: tuple[int, int], end: bool = False) -> int:
        """Bytes of `weight_packed`, `weight_scale` and `weight_shape` of a matrix (out, in)."""
        out, columns = shape
        return out * (4 * -(-columns * format.bits // 32) + 2 * format.groups(columns)) + _SHAPE_BYTES

    def weigher(self, bundle: "Bundle", modules: Iterable[str], noted: int, scratch: Path) -> Weigher:
        """From the writer; exact."""
        if find_spec("compressed_tensors") is None:
            raise MissingExtra("compressed-tensors", "compressed-tensors", f"quantize_auto for {self.kind}")
        from compress.export.compressed_tensors.artifact import write_checkpoint
        from compress.export.weighing import Written

        def write(bundle: "Bundle", folder: Path) -> Path:
            write_checkpoint(bundle, folder, self.dtype)
            return folder

        return Written(bundle, modules, write, self.stored, added=0, scratch=scratch)
