"""A decoder as one GGUF file: metadata, tokenizer, and tensors under llama.cpp's names.

Read from the same description as the ONNX graph (export/onnx/architecture.py). Norms and biases are float32,
what holds codes becomes blocks (export/gguf/blocks.py), other matrices float16 or float32. A tied head is
left out: llama.cpp then uses the embedding. Its `llama` architecture turns neighbouring pairs of a head's
rows, where transformers turns row i with row i + d/2, so rows of the query and key matrices (with their
codes, scales and zero-points) are put in that order.
Limits: Llama, Mistral, Qwen 2 and Qwen 3 with plain or Llama 3 rotary positions; no sliding window.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.export.gguf.blocks import blocks
from compress.export.gguf.tokenizer import Vocabulary, vocabulary
from compress.export.onnx.architecture import Decoder, Linear, Weight
from compress.export.onnx.families import describe
from compress.formats import QuantizedTensor
from compress.models.attention import window_size
from compress.version import __version__

FloatType = Literal["float16", "float32"]

_NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": LlamaFileType.MOSTLY_Q5_1,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}


@dataclass(frozen=True)
class Part:
    """A tensor of the file: its name there, what it holds, and the order its rows are put in."""

    name: str
    value: Weight
    order: Tensor | None = None


def require_supported(config: Any) -> None:
    """Raise UserError, before any work, for a model that llama.cpp's architectures do not describe."""

    def refuse(what: str) -> None:
        raise UserError(f"export_gguf: {what}; leave this export out")

    if config.model_type not in _NAMES:
        refuse(f"model_type '{config.model_type}' is not supported; supported: {', '.join(sorted(_NAMES))}")
    if config.hidden_act not in ("silu", "swish"):
        refuse(f"activation '{config.hidden_act}' is not supported; silu is")
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type", "default") not in ("default", "llama3"):
        refuse(f"rope_type '{rotary['rope_type']}' is not supported; default and llama3 are")
    if rotary.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial_rotary_factor is not supported; only 1.0 is")
    window = window_size(config)
    if window is not None and window < config.max_position_embeddings:
        refuse(f"sliding_window: {window} is not supported, llama.cpp would attend to the whole text")


def write_gguf(
    bundle: Bundle,
    file: Path,
    *,
    floats: FloatType = "float16",
    split: str | None = None,
    widen: bool = False,
) -> dict[str, Any]:
    """Write `file`; returns its types and sizes.

    Args:
        bundle: the model and its tokenizer.
        file: to write; its folder is made.
        floats: the type of matrices without codes.
        split: llama.cpp's name for how the tokenizer splits text; None: recognised.
        widen: codes of 2, 3 and 6 bits may take a wider type.

    Raises UserError for an architecture, a tokenizer or a format that GGUF has no place for.
    """
    require_supported(bundle.model.config)
    if any(getattr(module, "activations", None) is not None for module in bundle.model.modules()):
        raise UserError(
            "export_gguf: layers that round their inputs are not supported, llama.cpp rounds in its own way; "
            "leave this export out"
        )
    decoder = describe(bundle.model)
    words = vocabulary(bundle.tokenizer, decoder.vocabulary, split)
    writer = GGUFWriter(file, _NAMES[decoder.model_type])
    _describe_model(writer, decoder, bundle.model.config)
    _describe_tokenizer(writer, words)
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for part in parts(decoder, bundle.model.config):
        kind, array = encoded(part, floats, widen)
        raw = None if kind in ("F16", "F32") else GGMLQuantizationType[kind]
        writer.add_tensor(part.name, array, raw_dtype=raw)
        counts[kind] = counts.get(kind, 0) + 1
        sizes[kind] = sizes.get(kind, 0) + array.nbytes
    writer.add_file_type(_FILE_TYPES[max(sizes, key=lambda kind: sizes[kind])])
    file.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "architecture": _NAMES[decoder.model_type],
        "pre_tokenizer": words.split,
        "tensors": counts,
        "weight_bytes": sum(sizes.values()),
        "file_bytes": file.stat().st_size,
    }


def parts(decoder: Decoder, config: Any) -> Iterator[Part]:
    """Every tensor of the file, in the order it has there."""
    yield Part("token_embd.weight", decoder.embedding)
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        yield Part("rope_freqs.weight", _rope_factors(decoder, config))
    for index, block in enumerate(decoder.blocks):
        attention, mlp, prefix = block.attention, block.mlp, f"blk.{index}"
        if mlp.gate is None:
            raise UserError("export_gguf: an MLP without a gate is not supported; leave this export out")
        assert block.attention_norm is not None
        assert block.mlp_norm is not None
        pairs = _NAMES[decoder.model_type] == "llama"
        yield Part(f"{prefix}.attn_norm.weight", block.attention_norm.weight)
        for name, layer, heads in (
            ("attn_q", attention.query, attention.heads),
            ("attn_k", attention.key, attention.cache_heads),
        ):
            order = interleaved(heads, attention.head_width) if pairs else None
            yield from _layer(f"{prefix}.{name}", layer, order)
        yield from _layer(f"{prefix}.attn_v", attention.value)
        yield from _layer(f"{prefix}.attn_output", attention.output)
        for name, norm in (("attn_q_norm", attention.query_norm), ("attn_k_norm", attention.key_norm)):
            if norm is not None:
                yield Part(f"{prefix}.{name}.weight", norm.weight)
        yield Part(f"{prefix}.ffn_norm.weight", block.mlp_norm.weight)
        yield from _layer(f"{prefix}.ffn_gate", mlp.gate)
        yield from _layer(f"{prefix}.ffn_up", mlp.up)
        yield from _layer(f"{prefix}.ffn_down", mlp.down)
    yield Part("output_norm.weight", decoder.norm.weight)
    if decoder.head.name != "embedding":
        yield from _layer("output", decoder.head)


def interleaved(heads: int, width: int) -> Tensor:
    """Rows of `heads` heads so that row i of a head is followed by row i + width / 2: (heads * width,)."""
    return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).reshape(-1)


def encoded(part: Part, floats: FloatType, widen: bool = False) -> tuple[str, NDArray[Any]]:
    """The type and the array of a tensor. Raises UserError for values beyond float16."""
    if isinstance(part.value, QuantizedTensor):
        return blocks(part.name, part.value, part.order, widen)
    value = part.value.detach().float().cpu()
    if part.order is not None:
        value = value[part.order]
    if value.ndim == 1 or floats == "float32":
        return "F32", value.numpy()
    if float(value.abs().max()) > np.finfo(np.float16).max:
        raise UserError(f"export_gguf: {part.name} has values beyond float16; set floats: float32")
    return "F16", value.half().numpy()


def _layer(name: str, layer: Linear, order: Tensor | None = None) -> Iterator[Part]:
    yield Part(f"{name}.weight", layer.weight, order)
    if layer.bias is not None:
        yield Part(f"{name}.bias", layer.bias, order)


def _rope_factors(decoder: Decoder, config: Any) -> Tensor:
    """What llama.cpp divides the plain frequencies by, (head width / 2,)."""
    rotary = decoder.blocks[0].attention.rotary
    assert rotary is not None
    frequencies = rotary.frequencies
    steps = torch.arange(len(frequencies)) / len(frequencies)
    return float(config.rope_parameters["rope_theta"]) ** -steps / frequencies


def _describe_model(writer: GGUFWriter, decoder: Decoder, config: Any) -> None:
    first = decoder.blocks[0]
    shapes = {(b.attention.heads, b.attention.cache_heads, b.mlp.up.outputs) for b in decoder.blocks}
    if len(shapes) > 1:
        raise UserError(
            "export_gguf: blocks that differ in heads or MLP width are not supported; leave this export out"
        )
    # not the type of model: of a file named "mistral", transformers makes a model that it has no tensors for
    writer.add_name(type(config).__name__.removesuffix("Config"))
    writer.add_quantized_by(f"compress-lm {__version__}")
    writer.add_quantization_version(2)
    writer.add_block_count(len(decoder.blocks))
    writer.add_context_length(decoder.context)
    writer.add_embedding_length(int(decoder.embedding.shape[1]))
    writer.add_feed_forward_length(first.mlp.up.outputs)
    writer.add_head_count(first.attention.heads)
    writer.add_head_count_kv(first.attention.cache_heads)
    writer.add_key_length(first.attention.head_width)
    writer.add_value_length(first.attention.head_width)
    writer.add_rope_dimension_count(first.attention.head_width)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(decoder.norm.epsilon)
    writer.add_vocab_size(decoder.vocabulary)


def _describe_tokenizer(writer: GGUFWriter, words: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.split)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
        ("unk", writer.add_unk_token_id),
    ):
        if name in words.special:
            add(words.special[name])
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)
