"""Tiny random encoders, for the tests of what is done to them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from export_models import VOCABULARY, word_tokenizer

from compress.artifact.bundle import Bundle
from compress.models.checkpoints import quiet_transformers
from compress.records.manifest import Lineage

CONTEXT = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,  # no multiple of 64: the last group of a row is ragged
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 3,
}
# name -> (class, what differs from the sizes above)
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForMaskedLM", {"type_vocab_size": 1}),
    "distilbert": ("DistilBertForMaskedLM", {"dim": 64, "hidden_dim": 112, "n_layers": 1, "n_heads": 4}),
    "modernbert": (
        "ModernBertForMaskedLM",
        {
            "local_attention": 8,  # narrower than the texts that are tried
            "layer_types": ["sliding_attention"],
            **{f"{name}_token_id": number for number, name in enumerate(("bos", "eos", "cls", "sep"))},
        },
    ),
    "embedding": ("BertModel", {"hidden_act": "gelu_new"}),
}


def tiny_encoder(name: str, seed: int = 0) -> Bundle:
    """A model with random weights far enough from nothing for a mix-up to be seen."""
    kind, changes = ENCODERS[name]
    return tiny_model(kind, seed, **changes)


def tiny_model(kind: str, seed: int = 0, **changes: Any) -> Bundle:
    """The same of any class, with what differs from the sizes above."""
    model_class = getattr(transformers, kind)
    torch.manual_seed(seed)
    config = model_class.config_class(**{**_SIZES, **changes})
    config.architectures = [kind]
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tokenizer = word_tokenizer(mask_token="w4", pad_token="w3")
    if getattr(config, "type_vocab_size", 0) > 1:
        tokenizer.model_input_names = [*tokenizer.model_input_names, "token_type_ids"]
    return Bundle(model, tokenizer, Lineage(source="tiny"))


def write_encoder(folder: Path, text: Path, head: bool, blocks: int = 2) -> Path:
    """A random BERT with a WordPiece tokenizer of its text."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizerFast

    pieces = BertWordPieceTokenizer()
    pieces.train([str(p) for p in sorted(text.iterdir())], vocab_size=300, show_progress=False)
    config = BertConfig(
        vocab_size=pieces.get_vocab_size(), hidden_size=32, num_hidden_layers=blocks, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForMaskedLM(config) if head else BertModel(config)
    with torch.no_grad():  # far enough from its tiny initial weights for rounding to be seen
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    with quiet_transformers():
        model.save_pretrained(folder)
    BertTokenizerFast(tokenizer_object=pieces._tokenizer).save_pretrained(folder)
    return folder
