"""What ONNX Runtime takes of codes, and what they weigh in `onnx/`: the layouts of blocks.py and integers.py.

    blocks   per row ceil(in / block) blocks of block * bits / 8 bytes, a float16 scale of each, and packed
             zero-points where the format has some
    rows     of 8 bits with a scale per row, in the forms token and tensor: a byte per weight, a scale per
             row, and a byte for a zero-point that is stored

Matrices of a page or more begin on a page. The graph's own nodes, what is stacked, and the padding are as the
writer writes them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import UserError
from compress.export.layout import WIDTHS, Layout, Weigher
from compress.formats import Format
from compress.formats.packing import packed_bytes
from compress.records.manifest import PassRecord, changed_settings

if TYPE_CHECKING:
    from compress.artifact.bundle import Bundle
    from compress.export.onnx.forms import Forms

_PAGE = 4096


class OnnxLayout(Layout):
    """The folder `onnx/`: graph, weights, tokenizer, configuration and manifest."""

    bits: ClassVar[tuple[int, ...]] = (2, 4, 8)
    groups: ClassVar[tuple[int, ...]] = (64, 32, 128)

    kind: Literal["onnx"] = "onnx"
    int8_form: Literal["blocks", "token", "tensor"] | None = Field(
        None, description="as export_onnx.int8_form"
    )
    activation_bits: Literal[7, 8] | None = Field(None, description="as export_onnx.activation_bits")
    processor: Literal["any", "vnni"] = Field("any", description="as export_onnx.processor")
    accuracy_level: Literal[0, 1, 4] = Field(4, description="as export_onnx.accuracy_level")
    widen: bool = Field(False, description="as export_onnx.widen")
    cache: Literal["float32", "int8"] = Field("float32", description="as export_onnx.cache")

    def widths(self) -> tuple[int, ...]:
        """All that has a kernel of its width; others if they may be widened."""
        return WIDTHS if self.widen else self.bits

    def forms(self, continues: bool) -> "Forms":
        """The forms of a graph; `continues`: of a decoder."""
        from compress.export.onnx.forms import Forms

        form = self.int8_form or ("blocks" if continues else "token")
        bits = self.activation_bits or (8 if self.processor == "vnni" else 7)
        return Forms(form, bits, self.accuracy_level, self.processor)

    def objection(self, format: Format, columns: int) -> str | None:
        """Groups that cannot be cut into blocks."""
        from compress.export.onnx.blocks import block_width

        try:
            block_width(format, columns)
        except UserError as error:
            return str(error).removeprefix("export_onnx: ")
        return None

    def stored(self, format: Format, shape: tuple[int, int], blocks: bool) -> int:
        """Bytes of codes, scales and zero-points of a matrix (out, in); `blocks`: in any case as blocks."""
        from compress.export.onnx.blocks import block_width, kernel_bits

        out, columns = shape
        if not blocks and format.bits == 8 and format.groups(columns) == 1:
            return out * (columns + 2 + (not format.symmetric))
        block, bits = block_width(format, columns), kernel_bits(format)
        count = -(-columns // block)
        zeros = 0 if format.symmetric else packed_bytes(count, bits)
        return out * (count * (block * bits // 8 + 2) + zeros)

    def weigher(self, bundle: "Bundle", modules: Iterable[str], noted: int, scratch: Path) -> Weigher:
        """From the writer; the manifest's numbers of the check at their longest."""
        from compress.export.onnx.artifact import write_artifact, write_manifest
        from compress.export.weighing import LONGEST, Written
        from compress.tasks.registry import task_of

        task = task_of(bundle.model.config)
        forms = self.forms(task.continues)

        def write(bundle: "Bundle", folder: Path) -> Path:
            scales = _longest_scales(bundle.model) if self.cache == "int8" else None
            facts = write_artifact(bundle, folder, forms, scales)
            facts |= {"check": _longest_check(task.continues)}
            facts |= {"kl_with_float32_cache": LONGEST} if self.cache == "int8" else {}
            steps = (*bundle.lineage.steps, self._record(facts))
            lineage = bundle.lineage.model_copy(update={"steps": steps})
            write_manifest(bundle.evolve(lineage=lineage), folder, facts)
            return folder

        def stored(format: Format, shape: tuple[int, int], end: bool) -> int:
            # embedding and head of a decoder are blocks in every form (decoder.forms_of_ends)
            return self.stored(format, shape, forms.int8 == "blocks" or (end and task.continues))

        return Written(bundle, modules, write, stored, added=noted, scratch=scratch, padded=_padded)

    def _record(self, facts: dict[str, Any]) -> PassRecord:
        """What a run says of the export in the manifest, at its longest."""
        from compress.export.weighing import LONGEST

        more = {"cache_tokens": 10**6, "check_tokens": 10**5, "tolerance": LONGEST}
        return PassRecord(
            name="export_onnx", kind="export", config=self.model_dump() | more,
            changed=changed_settings(self) | more, exports=("onnx",),
            seconds=LONGEST, peak_rss_bytes=10**15, parent="0" * 64, fingerprint="0" * 64, seed=2**31,
            notes={"onnx": facts},
        )  # fmt: skip


def _padded(size: int) -> int:
    return -(-size // _PAGE) * _PAGE if size >= _PAGE else size


def _longest_check(continues: bool) -> dict[str, Any]:
    """What a check notes, each number at its longest; `continues`: of a decoder."""
    from dataclasses import fields

    from compress.export.onnx.check import Agreement
    from compress.export.onnx.encoder_check import EncoderAgreement
    from compress.export.weighing import LONGEST

    names = [field.name for field in fields(Agreement if continues else EncoderAgreement)]
    return {**dict.fromkeys(names, LONGEST), "measure": LONGEST, "passed": False}


def _longest_scales(model: Any) -> Any:
    """Scales of a cache in 8 bits, no two alike, so that none is stored once for several."""
    import torch

    from compress.export.onnx.attention import CacheScales
    from compress.export.onnx.families import describe

    found = []
    for index, block in enumerate(describe(model).blocks, start=1):
        heads, width = block.attention.cache_heads, block.attention.head_width
        numbers = torch.arange(1.0, heads * width + 1).view(1, heads, 1, width)
        found.append(CacheScales(numbers * (2 * index), numbers * (2 * index + 1)))
    return found
