"""Every tensor of a checkpoint's files is used, or may be left out for a reason, or is named in an error.

A tensor that the model has no place for can change what others mean: scales beside 8-bit values, a bias, an
adapter. Left out in silence they give another model. What may be left out: buffers that today's code computes
(frequencies of rotary positions, position ids, attention masks), heads of pre-training that are not used here
(BERT's pooler and next-sentence head), the head of a model that is asked for its hidden states, and what
`transformers` itself names for the class. Weights that are stored quantized are taken apart where
`transformers` does it exactly (block-scaled FP8, MXFP4), else refused by the method's name.
"""

import re
from collections.abc import Iterable
from typing import Any

from compress.errors import UserError

_COMPUTED = (
    r"(^|\.)(original_)?inv_freq$",
    r"(^|\.)position_ids$",
    r"(^|\.)attn?(ention)?\.(bias|masked_bias|causal_mask)$",
    r"(^|\.)num_batches_tracked$",
    r"(^|\.)version$",
)
_PRETRAINING = (r"(^|\.)pooler\.", r"(^|\.)seq_relationship\.", r"(^|\.)sop_classifier\.")
_LEFT_OUT = re.compile("|".join(f"(?:{pattern})" for pattern in (*_COMPUTED, *_PRETRAINING)))
_TAKEN_APART = frozenset({"fp8", "mxfp4"})


def unused(model: Any, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's tensors that the model should have had a place for.

    Args:
        model: of the checkpoint's configuration; it may be without data.
        names: of all tensors, or of those that nothing took.
    """
    own = model.state_dict().keys()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    prefix = f"{model.base_model_prefix}."
    headless = model.base_model is model
    return sorted(
        name
        for name in names
        if name not in own
        and not (headless and (name.removeprefix(prefix) in own or _is_head(model, name, prefix)))
        and not _LEFT_OUT.search(name)
        and not any(pattern.search(name) for pattern in ignored)
    )


def require_all_used(model: Any, names: Iterable[str], place: object) -> None:
    """Refuse a checkpoint with tensors that nothing in the model takes; arguments as of `unused`.

    Raises:
        UserError: names the first.
    """
    left = unused(model, names)
    if left:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        scaled = any("scale" in name or "zero" in name for name in left)
        advice = (
            "the weights are quantized in a way that is not read here; take the original checkpoint"
            if scaled
            else "name the class that has it under 'architectures', or take it out of the files"
        )
        raise UserError(f"{place}: nothing in the model takes the stored tensor '{left[0]}'{more}; {advice}")


def quantization(config: Any) -> str | None:
    """How a checkpoint's weights are quantized, by `transformers`' name of the method; None in float."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    given = settings if isinstance(settings, dict) else settings.to_dict()
    return str(getattr(given.get("quant_method"), "value", given.get("quant_method")))


def in_float(config: Any, place: object) -> Any:
    """The configuration itself, asking for weights in float if they are stored otherwise.

    Raises:
        UserError: the method cannot be taken apart.
    """
    method = quantization(config)
    if method in _TAKEN_APART:
        config.quantization_config["dequantize"] = True
    elif method is not None:
        raise UserError(
            f"{place}: its weights are quantized already ({method}), and passes start from float; take the "
            "original checkpoint"
        )
    return config


def _is_head(model: Any, name: str, prefix: str) -> bool:
    """Whether a tensor is of none of the model's parts, but of a head that stood on them."""
    parts = {child for child, _ in model.named_children()}
    return not name.startswith(prefix) and name.partition(".")[0] not in parts


def require_rows(model: Any, tokenizer: Any, place: object) -> None:
    """Refuse a tokenizer that makes tokens of text which the model has no rows for.

    Specials beyond the rows (a token to pad with that nobody trained) are never read here, and pass.

    Raises:
        UserError: with both numbers.
    """
    table = model.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None)
    if rows is None:
        return
    special = set(tokenizer.all_special_ids)
    token, number = max(
        ((token, number) for token, number in tokenizer.get_vocab().items() if number not in special),
        key=lambda entry: entry[1],
        default=("", -1),
    )
    if number >= rows:
        raise UserError(
            f"{place}: token {number} of its tokenizer ({token!r}) is beyond the model's {rows} rows; take "
            "it out of the tokenizer, or give the model rows for it"
        )


def in_float_now(model: Any, taken_apart: bool) -> Any:
    """The model itself without what marks it as quantized: its weights are float now, and transformers would
    refuse to save it, or quantize them again while it saves."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if taken_apart:
        model.__dict__.pop("_weight_conversions", None)
    model.hf_quantizer = None
    model.is_quantized = False
    return model
