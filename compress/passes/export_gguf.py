"""export_gguf: the model as one GGUF file for llama.cpp, made of the very codes it holds.

Method. Codes move into the GGUF type that has their grid (export/gguf/blocks.py): symmetric ones exactly
into Q4_0, Q5_0 or Q8_0, those with a zero-point into Q4_1 or Q5_1 with one rounded number per block of 32.
The file is read back and compared tensor by tensor (export/gguf/check.py), opened as anybody's is and its
metadata and tokenizer compared (export/gguf/reopened.py), and scored by llama.cpp where that is installed.
Cost: seconds, and the file. A scale per 32 weights is half a bit per weight, whatever the group was.
Limits: the architectures of export/gguf/artifact.py; byte-level BPE tokenizers; widths and groups that are
multiples of 32. llama.cpp's own K-quants have other grids and cannot hold these codes.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import nn

from compress.context import Context
from compress.errors import MissingExtra
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Need, Pass

if TYPE_CHECKING:
    from compress.artifact.bundle import Bundle
    from compress.export.layout import Layout
    from compress.formats import Format

FOLDER = "gguf"


class ExportGguf(Pass):
    """Write `gguf/model.gguf` and check it."""

    kind: ClassVar[Kind] = "export"
    needs: ClassVar[frozenset[Need]] = frozenset({"heldout"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"activations"})  # llama.cpp rounds in its own way

    floats: Literal["float16", "float32"] = Field("float16", description="of matrices that hold no codes")
    widen: bool = Field(
        False,
        description="store codes of 2, 3 and 6 bits in the next wider type, unchanged but larger; "
        "false: refuse them",
    )
    pre_tokenizer: str | None = Field(
        None,
        description="llama.cpp's name for how the tokenizer splits text; null: recognised from the tokenizer",
    )
    check_tokens: int = Field(1024, ge=32, le=65536, description="held-out tokens to score in llama.cpp")
    tolerance: float = Field(0.05, gt=0, description="mean KL to torch, in nats, that the check allows")

    def layers(self, model: nn.Module) -> list[str]:
        """Every matrix of the model.

        Raises UserError for an architecture that is not supported, MissingExtra without the package `gguf`.
        """
        if find_spec("gguf") is None:
            raise MissingExtra("gguf", "gguf", "export_gguf")
        from compress.export.gguf.artifact import require_supported
        from compress.formats.swap import embedding_names

        require_supported(model.config)
        return linear_layers(model) + embedding_names(model)

    def refuses(self, formats: tuple["Format", ...]) -> str | None:
        """Formats that no GGUF type can hold."""
        from compress.export.gguf.blocks import refusal

        return next((reason for f in formats if (reason := refusal(f, self.widen)) is not None), None)

    def refuses_layer(self, columns: int, format: "Format") -> str | None:
        """Rows that its blocks do not fill."""
        from compress.export.gguf.blocks import width_refusal

        return width_refusal(columns)

    def layout(self) -> "Layout":
        """How the file holds codes."""
        from compress.export.gguf.sizes import GgufLayout

        return GgufLayout(floats=self.floats, widen=self.widen, pre_tokenizer=self.pre_tokenizer)

    def __call__(self, bundle: "Bundle", context: Context) -> "Bundle":
        """Write and check `context.workdir / "gguf" / "model.gguf"`; the model itself is not changed.

        Raises:
            UserError: as `layers` and `refuses`, a width that 32 does not divide, or another tokenizer.
            ExportCheckFailed: the file, or llama.cpp's logits, are not those of the model.
        """
        self.layers(bundle.model)
        from compress.artifact.integrity import write_sums
        from compress.export.gguf.artifact import write_gguf
        from compress.export.gguf.check import check_file, check_llama_cpp
        from compress.export.gguf.reopened import check_reopens

        folder = context.workdir / FOLDER
        file = folder / "model.gguf"
        folder.mkdir(parents=True, exist_ok=True)
        facts = write_gguf(bundle, file, floats=self.floats, split=self.pre_tokenizer, widen=self.widen)
        facts["check"] = check_file(bundle, file)
        check_reopens(bundle, file, self.pre_tokenizer)
        windows = context.data.heldout.tokens
        windows = windows[: max(1, self.check_tokens // windows.shape[1])]
        facts["llama_cpp"] = check_llama_cpp(bundle.model, file, windows, context.threads, self.tolerance)
        write_sums(folder)
        return bundle.evolve(exports={**bundle.exports, FOLDER: folder}, notes={"gguf": facts})
