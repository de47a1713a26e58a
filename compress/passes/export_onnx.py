"""export_onnx: the model as one ONNX graph that ONNX Runtime runs fast, made of the very codes it holds.

Method. A decoder is described from its modules (export/onnx/families/) and written directly, without tracing:
fused attention with a key-value cache, fused q,k,v, embedding and head sharing one copy. An encoder (BERT and
its relatives) or encoder-decoder (T5, BART: two graphs, export/onnx/seq2seq.py) is traced by torch with its
matrices left out (export/onnx/trace.py); they are filled in afterwards.
Either way integer layers take a form chosen by measurement (export/onnx/linear.py). Then ONNX Runtime must
reproduce torch on held-out text (export/onnx/check.py, export/onnx/encoder_check.py); an export that does not
is an error, never a warning.
With `cache: int8` a decoder keeps keys and values in 8 bits, with scales per column from calibration text
(export/onnx/cache.py). The graph is then written and checked twice, first with a float32 cache, and the notes
tell what the codes of the cache alone cost.
Cost: seconds, and the size of the weights on disk.
Limits: the decoders listed in export/onnx/families/; encoders that torch can trace, with the extra
`encoders`; CPU kernels.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from compress.context import Context
from compress.errors import UserError
from compress.passes.base import Kind, Need, Pass
from compress.tasks.base import Task
from compress.tasks.registry import TASKS

if TYPE_CHECKING:
    from compress.artifact.bundle import Bundle
    from compress.export.onnx.check import GraphKind
    from compress.export.onnx.forms import Forms
    from compress.export.onnx.sizes import OnnxLayout
    from compress.formats import Format
    from compress.runtimes.base import Tokens


class ExportOnnx(Pass):
    """Write `onnx/` and check it."""

    kind: ClassVar[Kind] = "export"
    tasks: ClassVar[frozenset[Task]] = TASKS
    needs: ClassVar[frozenset[Need]] = frozenset({"heldout", "calibration"})
    # its kernels round activations per token or block in their own way, and on a fixed grid in this one
    not_after: ClassVar[frozenset[Kind]] = frozenset({"activations"})

    int8_form: Literal["blocks", "token", "tensor"] | None = Field(
        None,
        description="8-bit layers with a scale per row: activations rounded per block of 64 columns "
        "(closest, fastest decode), per token (fastest prefill), or per tensor (loses quality); null: blocks "
        "for decoders, token for encoders",
    )
    activation_bits: Literal[7, 8] | None = Field(
        None,
        description="of the forms token and tensor: 7 is fastest, 8 half as coarse and slower, unless the "
        "processor has VNNI; null: 7, with VNNI 8",
    )
    processor: Literal["any", "vnni"] = Field(
        "any",
        description="of the forms token and tensor: vnni is fast with 8-bit activations, and other "
        "processors refuse the file",
    )
    accuracy_level: Literal[0, 1, 4] = Field(
        4, description="of MatMulNBits: 4 rounds activations per block to 8 bits; 0 and 1 keep float32"
    )
    widen: bool = Field(
        False,
        description="store codes of 3 bits in 4, of 5 and 6 in 8: ONNX Runtime has no kernel for them",
    )
    cache: Literal["float32", "int8"] = Field(
        "float32", description="keys and values of the text so far: int8 takes a quarter of the memory"
    )
    cache_tokens: int = Field(
        8192, ge=32, le=1_000_000, description="calibration tokens that the scales of an int8 cache see"
    )
    check_tokens: int = Field(1024, ge=32, le=65536, description="held-out tokens to compare with torch on")
    tolerance: float | None = Field(
        None, gt=0, description="overrides the check's tolerance; null: the one for the kind of graph"
    )

    def layers(self, model: nn.Module) -> list[str]:
        """Every matrix of the model.

        Raises UserError for an architecture that has no graph here, and for a graph for other processors than
        this one, on which it could not be checked.
        """
        from compress.export.onnx.families import require_supported
        from compress.export.onnx.trace import require_tracer
        from compress.formats.swap import embedding_names
        from compress.host.machine import adds_products_in_32_bits
        from compress.models.layers import linear_layers
        from compress.tasks.registry import task_of

        if self.processor == "vnni" and not adds_products_in_32_bits():
            raise UserError(
                f"{self.name()}.processor: vnni is not reported by this processor, on which the graph could "
                "not be checked; export where it is, or set processor: any"
            )
        config: Any = model.config
        if task_of(config).continues:
            require_supported(config)
        elif task_of(config).pairs:
            raise UserError(
                f"{self.name()}: a next-sentence head (BertForPreTraining) is not exported; finetune the "
                "model for what it is for, or write BertForMaskedLM under 'architectures' in its "
                "config.json, which leaves that head out"
            )
        else:
            require_tracer()
            if task_of(config).writes and getattr(config, "num_experts", 0) > 0:
                raise UserError(
                    f"{self.name()}: experts of an encoder-decoder (model_type '{config.model_type}') "
                    "are not supported; leave export_onnx out of the recipe to have it in torch only"
                )
            if self.cache == "int8":
                raise UserError(f"{self.name()}.cache: int8 is for decoders; this graph keeps no cache")
        return linear_layers(model) + embedding_names(model)

    def requires(self) -> frozenset[Need]:
        """Text to calibrate a cache in codes on, if it is to be one."""
        return self.needs if self.cache == "int8" else self.needs - {"calibration"}

    def cannot_follow(self, earlier: Pass) -> bool:
        """Static rounding of activations is what it writes; other rounding it does itself."""
        return super().cannot_follow(earlier) and getattr(earlier, "mode", None) != "static"

    def refuses(self, formats: tuple["Format", ...]) -> str | None:
        """Formats without a kernel."""
        from compress.export.onnx.blocks import refusal

        return next((reason for f in formats if (reason := refusal(f, self.widen)) is not None), None)

    def refuses_layer(self, columns: int, format: "Format") -> str | None:
        """Groups that no kernel's blocks divide."""
        from compress.export.onnx.blocks import group_refusal

        return group_refusal(format, columns)

    def layout(self) -> "OnnxLayout":
        """How the file holds codes."""
        from compress.export.onnx.sizes import OnnxLayout

        return OnnxLayout(**{name: getattr(self, name) for name in OnnxLayout.model_fields if name != "kind"})

    def __call__(self, bundle: "Bundle", context: Context) -> "Bundle":
        """Write and check the folder `context.workdir / "onnx"`; the model itself is not changed.

        Raises:
            UserError: codes of a format without a kernel; a graph for VNNI on a processor without.
            ExportCheckFailed: ONNX Runtime does not reproduce torch within the tolerance.
        """
        from compress.export.onnx.artifact import write_artifact, write_manifest
        from compress.export.onnx.cache import cache_scales
        from compress.export.onnx.forms import per_row
        from compress.formats import QuantizedEmbedding, QuantizedLinear
        from compress.tasks.registry import task_of

        coded = (m for m in bundle.model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding))
        reason = self.refuses(tuple(module.quantized.format for module in coded))
        if reason is not None:
            raise UserError(f"{self.name()}: {reason}")
        for name, module in bundle.model.named_modules():
            rule = module.activations if isinstance(module, QuantizedLinear) else None
            if rule is not None and not (rule.mode == "static" and per_row(module.quantized)):
                raise UserError(
                    f"{self.name()}: '{name}' rounds its inputs ({rule.mode}) and holds "
                    f"{module.quantized.format.bits}-bit codes, and only static rounding is written, with "
                    "format int8 (a scale per row). Leave round_activations out: int8_form rounds per token"
                )
        forms = self.layout().forms(task_of(bundle.model.config).continues)
        folder = context.workdir / "onnx"
        facts = write_artifact(bundle, folder, forms)
        notes = self._check(bundle, folder, facts, forms, context)
        if self.cache == "int8":
            windows = self._windows(context.data.calibration.tokens, self.cache_tokens, facts)
            scales = cache_scales(bundle.model, windows)
            facts = write_artifact(bundle, folder, forms, scales)
            before, notes = notes, self._check(bundle, folder, facts, forms, context)
            facts["kl_with_float32_cache"] = before["kl"]
        facts["check"] = notes
        write_manifest(bundle, folder, facts)
        return bundle.evolve(exports={**bundle.exports, "onnx": folder}, notes={"onnx": facts})

    def _check(
        self, bundle: "Bundle", folder: Path, facts: dict[str, Any], forms: "Forms", context: Context
    ) -> dict[str, Any]:
        """What comparing the written graph with the model found."""
        from compress.export.onnx.check import compare
        from compress.export.onnx.encoder_check import compare_encoder
        from compress.runtimes.onnx_encoder import OnnxEncoder
        from compress.runtimes.onnx_runtime import OnnxRuntime
        from compress.runtimes.onnx_seq2seq import OnnxSeq2Seq
        from compress.tasks.registry import task_of

        windows = self._windows(context.data.heldout.tokens, self.check_tokens, facts)
        kind, threads = _kind(facts, forms), context.threads
        task = task_of(bundle.model.config)
        if task.continues:
            decoder = OnnxRuntime(folder, threads=threads)
            return compare(bundle.model, decoder, windows, kind, self.tolerance).notes()
        padding = bundle.tokenizer.pad_token_id or 0
        opened = OnnxSeq2Seq if task.writes else OnnxEncoder
        encoder = opened(folder, threads=threads)
        return compare_encoder(bundle.model, encoder, windows, kind, self.tolerance, padding).notes()

    @staticmethod
    def _windows(tokens: "Tokens", count: int, facts: dict[str, Any]) -> "Tokens":
        """About `count` tokens of windows (n, length), none longer than the model's context."""
        length = min(tokens.shape[1], facts["context"])
        return tokens[: max(1, count // length), :length]


def _kind(facts: dict[str, Any], forms: "Forms") -> "GraphKind":
    """Which tolerance applies to a graph of these forms."""
    used = set(facts["linear_forms"])
    if facts.get("cache") == "int8":
        return "activations"
    if used == {"float"}:
        return "float32"
    rounds = "token" in used or "tensor" in used or ("blocks" in used and forms.accuracy_level == 4)
    return "activations" if rounds else "weights"
