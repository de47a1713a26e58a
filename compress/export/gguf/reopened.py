"""Does a written GGUF file open again, as the model it was written of?

Tensors are compared by export/gguf/check.py. Here the rest is read with what reads anybody's file: the
header, the configuration that the metadata mean, and the tokenizer. Each must say what the model says.
Cost: one reading of the header and one of the vocabulary; no weights.
Limits: a `pre_tokenizer` that was given is taken at its word; text is cut and compared only where the name
was recognised.
"""

import math
from pathlib import Path
from typing import Any

import torch

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.export.onnx.architecture import Decoder
from compress.export.onnx.check import ExportCheckFailed
from compress.export.onnx.families import describe
from compress.models.checkpoints import load_tokenizer, meta_model
from compress.models.gguf import head_width
from compress.models.gguf_tokenizer import WORDS

_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs, 2468 more; it's late.\n\n    def f(x):\n\treturn x\n",
    "naïve Größe — 東京\u00a0😀  trailing  ",
)


def check_reopens(bundle: Bundle, file: Path, split: str | None) -> None:
    """Open the file as anybody's is opened, and compare what it says with the model.

    Args:
        bundle: what was written.
        file: where to.
        split: the name for how text is split, if one was given.

    Raises:
        ExportCheckFailed: it does not open, or says something else.
    """
    try:
        model = meta_model(str(file))
        tokenizer = None if split is not None and split not in WORDS else load_tokenizer(file)
    except UserError as error:
        raise ExportCheckFailed(f"export_gguf: the file does not open again: {error}") from None
    decoder = describe(bundle.model)
    for name, (found, wanted) in _sizes(model.config, decoder).items():
        if not math.isclose(found, wanted, rel_tol=1e-6):
            raise ExportCheckFailed(
                f"export_gguf: the file says {name} {found:g} where the model has {wanted:g}; "
                "please report it"
            )
    rotary = decoder.blocks[0].attention.rotary
    if rotary is not None and not torch.allclose(
        _frequencies(model), rotary.frequencies.float(), rtol=1e-5, atol=0
    ):
        raise ExportCheckFailed(
            "export_gguf: the file says other frequencies of positions than the model has; please report it"
        )
    if tokenizer is not None:
        _require_same_tokens(tokenizer, bundle.tokenizer, text=split is None)


def _sizes(config: Any, decoder: Decoder) -> dict[str, tuple[float, float]]:
    """Name -> (what the file says, what the model has)."""
    first = decoder.blocks[0]
    return {
        "blocks": (config.num_hidden_layers, len(decoder.blocks)),
        "context": (config.max_position_embeddings, decoder.context),
        "width": (config.hidden_size, int(decoder.embedding.shape[1])),
        "width of the MLP": (config.intermediate_size, first.mlp.up.outputs),
        "heads": (config.num_attention_heads, first.attention.heads),
        "heads of keys": (config.num_key_value_heads, first.attention.cache_heads),
        "width of a head": (head_width(config), first.attention.head_width),
        "epsilon of norms": (config.rms_norm_eps, decoder.norm.epsilon),
        "tokens": (config.vocab_size, decoder.vocabulary),
    }


def _frequencies(model: Any) -> torch.Tensor:
    """Of rotary positions, (head width / 2,), as the configuration of a model without data means them."""
    module = next(m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor))
    made = type(module)(config=model.config)
    return made.inv_freq.float()


def _require_same_tokens(found: Any, wanted: Any, *, text: bool) -> None:
    """The file may have more tokens, which fill the rows that the tokenizer leaves."""
    theirs = found.get_vocab()
    for token, number in sorted(wanted.get_vocab().items(), key=lambda entry: entry[1]):
        if theirs.get(token) != number:
            raise ExportCheckFailed(
                f"export_gguf: the file's tokenizer has token {number} ({token!r}) as {theirs.get(token)}; "
                "please report it"
            )
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(wanted, name) is not None and getattr(found, name) != getattr(wanted, name):
            raise ExportCheckFailed(
                f"export_gguf: the file says {name} {getattr(found, name)} where the tokenizer has "
                f"{getattr(wanted, name)}; please report it"
            )
    for sample in _TEXTS if text else ():
        ids = [tokenizer(sample, verbose=False)["input_ids"] for tokenizer in (found, wanted)]
        if ids[0] != ids[1]:
            raise ExportCheckFailed(
                f"export_gguf: the file's tokenizer cuts {sample[:40]!r} into {len(ids[0])} tokens, the "
                f"model's into {len(ids[1])}, or others; please report it, or leave this export out"
            )
