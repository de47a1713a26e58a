"""`genai_config.json`: what lets `onnxruntime-genai` (0.14 or newer) run the folder as it is.

The model type is `decoder`, the one for graphs that need nothing special: names such as `phi3` or `gpt2`
stand there for graphs whose inputs or angles change while the text grows. Its logits are this graph's
`last_logits`, because the library takes a second dimension of 1 as a promise that a prompt yields one row;
without it, it would want logits of every position. Numbers of tokens to begin, end and pad come from the
generation configuration where that has them.
Limits: where no token ends a text there is no such file, since the library demands one. It allocates the
whole cache for `max_length` tokens when a generation starts, so the default written here stays below long
contexts; ask for more there, up to the context.
"""

from typing import Any

from compress.export.onnx.architecture import Decoder
from compress.export.onnx.graph import MODEL_FILE

FILE = "genai_config.json"
_MAX_LENGTH = 4096  # tokens


def genai_config(model: Any, tokenizer: Any, decoder: Decoder) -> dict[str, Any] | None:
    """The file's content, for a graph that export/onnx/decoder.py wrote; None where no token ends a text."""
    first = decoder.blocks[0].attention
    end = _token("eos_token_id", model, tokenizer)
    if end is None:
        return None
    begin, pad = (_token(name, model, tokenizer) for name in ("bos_token_id", "pad_token_id"))
    first_end = end[0] if isinstance(end, list) else end
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": first_end if begin is None else begin,
            "eos_token_id": end,
            "pad_token_id": first_end if pad is None else pad,
            "context_length": decoder.context,
            "vocab_size": decoder.vocabulary,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL_FILE,
                "head_size": first.head_width,
                "hidden_size": int(decoder.embedding.shape[1]),
                "num_attention_heads": first.heads,
                "num_key_value_heads": first.cache_heads,
                "num_hidden_layers": len(decoder.blocks),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "last_logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(decoder.context, _MAX_LENGTH),
            "past_present_share_buffer": True,
        },
    }


def _token(name: str, model: Any, tokenizer: Any) -> Any:
    """A special token's number (or, of `eos_token_id`, numbers), from wherever it is set first."""
    sources = (getattr(model, "generation_config", None), model.config, tokenizer)
    return next((value for source in sources if (value := getattr(source, name, None)) is not None), None)
