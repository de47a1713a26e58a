"""What GGUF takes of codes, and what they weigh there: blocks of 32 weights, whole (export/gguf/blocks.py).

    Q4_0 18 bytes   Q4_1 20   Q5_0 22   Q5_1 24   Q8_0 34

Every tensor begins at a multiple of 32 bytes. Header, names and tokenizer are as the writer writes them.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import MissingExtra
from compress.export.gguf.blocks import BLOCK, block_type, refusal
from compress.export.layout import WIDTHS, Layout, Weigher
from compress.formats import Format

if TYPE_CHECKING:
    from compress.artifact.bundle import Bundle

BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
_ALIGNED = 32
_WITH_MINIMA = (4, 5)  # bits that have a type with and without


class GgufLayout(Layout):
    """One file, `gguf/model.gguf`."""

    bits: ClassVar[tuple[int, ...]] = (4, 5, 8)
    groups: ClassVar[tuple[int, ...]] = (BLOCK,)
    symmetric: ClassVar[bool] = True
    eight: ClassVar[dict[str, Any]] = {"kind": "int8", "group": BLOCK}
    noted: ClassVar[bool] = False

    kind: Literal["gguf"] = "gguf"
    floats: Literal["float16", "float32"] = Field("float16", description="as export_gguf.floats")
    widen: bool = Field(False, description="as export_gguf.widen")
    pre_tokenizer: str | None = Field(None, description="as export_gguf.pre_tokenizer")

    def widths(self) -> tuple[int, ...]:
        """All that has a type of its width; others if they may be widened."""
        return WIDTHS if self.widen else self.bits

    def signs(self, bits: int) -> tuple[bool, ...]:
        """Types with a minimum, too, where there are some."""
        return (True, False) if bits in _WITH_MINIMA else (True,)

    def objection(self, format: Format, columns: int) -> str | None:
        """Formats without a type, and rows that are no whole blocks."""
        if columns % BLOCK:
            return f"GGUF stores codes in blocks of {BLOCK}; leave such layers float (skip)"
        return refusal(format, self.widen)

    def stored(self, format: Format, shape: tuple[int, int], end: bool = False) -> int:
        """Bytes of the blocks of a matrix (out, in)."""
        out, columns = shape
        return out * (columns // BLOCK) * BLOCK_BYTES[str(block_type(format, self.widen))]

    def weigher(self, bundle: "Bundle", modules: Iterable[str], noted: int, scratch: Path) -> Weigher:
        """From the writer; exact."""
        if find_spec("gguf") is None:
            raise MissingExtra("gguf", "gguf", f"quantize_auto for {self.kind}")
        from compress.export.gguf.artifact import write_gguf
        from compress.export.weighing import Written

        def write(bundle: "Bundle", folder: Path) -> Path:
            file = folder / "model.gguf"
            folder.mkdir()
            write_gguf(bundle, file, floats=self.floats, split=self.pre_tokenizer, widen=self.widen)
            return file

        return Written(bundle, modules, write, self.stored, added=0, scratch=scratch, padded=_padded)


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
