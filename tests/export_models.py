"""Tiny random models of every exported family, for the tests of export and ONNX Runtime."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from compress.artifact.bundle import Bundle
from compress.export.onnx import seq2seq as seq2seq_export
from compress.export.onnx.forms import Forms
from compress.export.onnx.trace import trace, without_matrices
from compress.formats import Format, QuantizedTensor
from compress.formats.swap import put_codes, quantize_embeddings
from compress.models.layers import linear_layers, matrix
from compress.records.manifest import Lineage
from compress.runtimes.onnx_runtime import OnnxRuntime

VOCABULARY = 97
CONTEXT = 64
SPINNING = "session.intra_op.allow_spinning"  # of ONNX Runtime's threads: 0 ends it
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,  # no multiple of 64: the last group of a row is ragged
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,  # logits far enough apart for a greedy choice to mean something
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_KINDS = ["sliding_attention", "full_attention"]
_HALF_TURNED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# name -> (family, what differs from the sizes above)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_multi_head": ("Llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("Llama", {"rope_parameters": _LLAMA3}),
    "mistral_window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gpt2": ("GPT2", {"activation_function": "gelu_new", "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "olmo2": ("Olmo2", {"tie_word_embeddings": False}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 32,
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": ("Gemma3Text", {"head_dim": 32, "sliding_window": 7, "layer_types": _KINDS}),
    "phi": ("Phi", {"rope_parameters": _HALF_TURNED}),
    "phi_normed_heads": ("Phi", {"rope_parameters": _HALF_TURNED, "qk_layernorm": True}),
    "phi3": ("Phi3", {"sliding_window": 7}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_neox_in_turn": ("GPTNeoX", {"use_parallel_residual": False, "tie_word_embeddings": True}),
}


def tiny_model(name: str, seed: int = 0) -> Any:
    family, changes = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at constants, which would hide a mix-up
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def tiny_bundle(name: str) -> Bundle:
    return Bundle(tiny_model(name), word_tokenizer(), Lineage(source="tiny"))


def word_tokenizer(**special: str) -> Any:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", **special
    )


def quantized(bundle: Bundle, format: Format, embeddings: Format | None = None) -> Bundle:
    result = bundle.clone()
    for name in linear_layers(result.model):
        put_codes(result.model, name, QuantizedTensor.round(format, matrix(result.model.get_submodule(name))))
    quantize_embeddings(result.model, embeddings or format)
    return result


def exported(bundle: Bundle, folder: Path, forms: Forms | None = None) -> OnnxRuntime:
    from compress.export.onnx.artifact import write_artifact

    write_artifact(bundle, folder, forms or Forms())
    return OnnxRuntime(folder, threads=1)


_TRACED: dict[str, bytes] = {}


@contextmanager
def traced_once() -> Iterator[None]:
    """While the block runs, an encoder-decoder is traced once for all formats: seconds each time, and the
    graph holds none of its matrices. What it does hold, the rest of the parameters, must be the same."""
    import onnx

    def once(model: Any, inputs: Any, outputs: Any, answer: Any, **options: Any) -> Any:
        rest, config = without_matrices(model), model.config.to_dict() | {"_name_or_path": ""}
        known = hashlib.sha256(repr((rest, config, inputs, list(outputs), options)).encode())
        for name, tensor in rest.state_dict().items():
            known.update(name.encode() + tensor.numpy().tobytes())
        key = known.hexdigest()
        if key not in _TRACED:
            _TRACED[key] = trace(model, inputs, outputs, answer, **options).SerializeToString()
        return onnx.ModelProto.FromString(_TRACED[key])

    with mock.patch.object(seq2seq_export, "trace", once):
        yield


def tokens(batch: int, length: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length)).astype(np.int32)


def torch_logits(model: Any, ids: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(ids.astype(np.int64))).logits.numpy()


def session_entry(runtime: Any, key: str, session: str = "_session") -> str | None:
    """What ONNX Runtime was told about a session of a runtime; None where nothing."""
    try:
        return getattr(runtime, session).get_session_options().get_session_config_entry(key)
    except RuntimeError:  # nothing
        return None
