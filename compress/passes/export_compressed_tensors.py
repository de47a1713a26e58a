"""export_compressed_tensors: a checkpoint of codes that stock `transformers` and vLLM load.

Method. The very codes, scales and zero-points are packed as compressed-tensors packs them
(export/compressed_tensors/artifact.py) and written beside a configuration that names each layer's format.
Then the folder is loaded with stock `from_pretrained` and must give back the same weights and the same logits
(export/compressed_tensors/check.py).
Cost: seconds, and the size of the codes on disk. Embeddings, and a head tied to them, go to disk as float16:
transformers cannot load them as codes.
Limits: `torch.nn.Linear` layers (no GPT-2); a group must divide a row. In transformers the codes are unpacked
to float weights at the first use: smaller on disk, not in memory; vLLM computes from the codes, on a GPU.
Loading in transformers is checked at every export. What is said of vLLM follows its source of 2026; no folder
was run in it.
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

FOLDER = "compressed-tensors"

_VLLM_GROUPS = (None, 32, 64, 128)


class ExportCompressedTensors(Pass):
    """Write `compressed-tensors/` and check it."""

    kind: ClassVar[Kind] = "export"
    needs: ClassVar[frozenset[Need]] = frozenset({"heldout"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"activations"})  # they would be lost without a word

    runtimes: tuple[Literal["transformers", "vllm"], ...] = Field(
        ("transformers", "vllm"),
        min_length=1,
        description="what must be able to load it: formats one of them has no kernel for are refused "
        "before any work",
    )
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="of what holds no codes, and what the model is loaded as by default"
    )
    check_tokens: int = Field(1024, ge=32, le=65536, description="held-out tokens to compare with torch on")
    tolerance: float = Field(1e-3, gt=0, description="mean KL to torch, in nats, that the check allows")

    def layers(self, model: nn.Module) -> list[str]:
        """Every linear layer of the blocks.

        Raises UserError for layers that compressed-tensors does not know, MissingExtra without the package.
        """
        from compress.export.compressed_tensors.artifact import require_linear

        if find_spec("compressed_tensors") is None:
            raise MissingExtra("compressed-tensors", "compressed-tensors", "export_compressed_tensors")
        found = linear_layers(model)
        for name in found:
            require_linear(name, model.get_submodule(name))
        return found

    def refuses(self, formats: tuple["Format", ...]) -> str | None:
        """Formats outside the layout, and those that vLLM has no kernel for if it is among the runtimes."""
        from compress.export.compressed_tensors.artifact import refusal

        outside = next((reason for f in formats if (reason := refusal(f)) is not None), None)
        if outside is not None:
            return outside
        if "vllm" not in self.runtimes:
            return None
        alone = "; set runtimes: [transformers] to write it for transformers only"
        for form in formats:
            if form.bits not in (4, 8):
                return f"vLLM has kernels for 4 and 8 bits in all versions, not for {form.kind}" + alone
            if form.group not in _VLLM_GROUPS:
                return f"vLLM has kernels for groups of 32, 64, 128 and null, not {form.group}" + alone
        return None

    def refuses_layer(self, columns: int, format: "Format") -> str | None:
        """Rows that groups do not divide."""
        from compress.export.compressed_tensors.artifact import width_refusal

        return width_refusal(columns, format)

    def layout(self) -> "Layout":
        """How the file holds codes."""
        from compress.export.compressed_tensors.sizes import CompressedTensorsLayout

        return CompressedTensorsLayout(dtype=self.dtype, runtimes=self.runtimes)

    def __call__(self, bundle: "Bundle", context: Context) -> "Bundle":
        """Write and check the folder `context.workdir / "compressed-tensors"`; the model stays as it is.

        Raises:
            UserError: as `layers`, and for groups that do not divide a row.
            ExportCheckFailed: transformers does not load it, or computes something else.
        """
        from compress.export.compressed_tensors.artifact import write_checkpoint
        from compress.export.compressed_tensors.check import check_loads

        self.layers(bundle.model)
        folder = context.workdir / FOLDER
        facts = write_checkpoint(bundle, folder, self.dtype)
        windows = context.data.heldout.tokens
        windows = windows[: max(1, self.check_tokens // windows.shape[1])]
        facts["check"] = check_loads(bundle.model, folder, windows, self.tolerance)
        return bundle.evolve(exports={**bundle.exports, FOLDER: folder}, notes={"compressed_tensors": facts})
