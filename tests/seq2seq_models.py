"""Tiny random encoder-decoders, for the tests of what is done to them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from export_models import VOCABULARY, word_tokenizer

from compress.artifact.bundle import Bundle
from compress.models.checkpoints import quiet_transformers
from compress.records.manifest import Lineage

CONTEXT = 64
PADDING = 3
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PADDING, "eos_token_id": 2}
# name -> (class, its sizes); widths that no group of 64 divides
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 112,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 3,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        {
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 112,
            "decoder_ffn_dim": 112,
            "max_position_embeddings": CONTEXT,
            "scale_embedding": True,
            "bos_token_id": 0,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
}


def tiny_seq2seq(name: str, seed: int = 0, tokenizer: Any = None) -> Bundle:
    """A model with random weights far enough from nothing for a mix-up to be seen."""
    kind, sizes = SEQ2SEQ[name]
    tokenizer = tokenizer or word_tokenizer(pad_token="w3")
    model_class = getattr(transformers, kind)
    torch.manual_seed(seed)
    config = model_class.config_class(**{**_IDS, **sizes, "vocab_size": len(tokenizer)})
    config.architectures = [kind]
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return Bundle(model, tokenizer, Lineage(source="tiny"))


def write_seq2seq(folder: Path, name: str, tokenizer: Any) -> Path:
    """A checkpoint as others write it."""
    with quiet_transformers():
        tiny_seq2seq(name, tokenizer=tokenizer).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
