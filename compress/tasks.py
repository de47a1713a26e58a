"""What a model is for: to continue text, to fill in masked tokens, or to embed text.

Known from the class that its configuration names. All three are quantized by the same passes; they differ
in how their quality is measured.
"""

from typing import Any, Literal

from compress.errors import UserError

Task = Literal["causal", "masked", "embedding"]


def task_of(config: Any) -> Task:
    """The task of a `transformers` configuration.

    >>> from transformers import BertConfig
    >>> [task_of(BertConfig(architectures=[name])) for name in ("BertForMaskedLM", "BertModel")]
    ['masked', 'embedding']
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith("ForMaskedLM"):
        return "masked"
    if name.endswith("Model") and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "embedding"
    return "causal"


def auto_class(config: Any) -> Any:
    """The `transformers` class that makes such a model. Raises UserError for an encoder-decoder."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model: model_type '{config.model_type}' is an encoder-decoder, which is not supported; "
            "use a decoder or an encoder"
        )
    classes = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "embedding": AutoModel}
    return classes[task_of(config)]


def longest_text(model: Any) -> int:
    """The most tokens a `transformers` model takes; RoBERTa keeps its first positions for padding."""
    config = model.config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 2**31 - 1)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return longest - int(module.padding_idx) - 1
    return longest
