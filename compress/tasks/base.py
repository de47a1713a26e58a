"""What a model is for: to continue text, to answer it, to fill in masked tokens, or to embed text.

Known from the class that its configuration names. All are quantized by the same passes; they differ in how
their quality is measured.

    causal     a decoder (Llama, GPT-2): every token from those before it
    seq2seq    an encoder-decoder (T5, BART): the second half of a window from the whole first half and the
               tokens of the second before each
    masked     an encoder with a masked-LM head (BERT): tokens that are hidden from it
    embedding  an encoder without a head (MiniLM): the mean of a text's last hidden states
"""

from typing import Any, Literal, TypeVar, get_args

from compress.errors import UserError

T = TypeVar("T", bound=Any)  # an array or a tensor

Task = Literal["causal", "seq2seq", "masked", "embedding"]
TASKS: frozenset[Task] = frozenset(get_args(Task))
KINDS: dict[Task, str] = {
    "causal": "a decoder",
    "seq2seq": "an encoder-decoder",
    "masked": "an encoder",
    "embedding": "an encoder",
}
_OTHERS = ("Classification", "ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")
WRITERS: tuple[Task, ...] = ("causal", "seq2seq")  # those that give text, token by token


def task_of(config: Any) -> Task:
    """The task of a `transformers` configuration.

    Raises:
        UserError: it is of a classifier or the like, of which another head would be made up.

    >>> from transformers import BertConfig
    >>> [task_of(BertConfig(architectures=[name])) for name in ("BertForMaskedLM", "BertModel")]
    ['masked', 'embedding']
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    name = str((getattr(config, "architectures", None) or [""])[0])
    if name.endswith(_OTHERS):
        raise UserError(
            f"architectures: {name} is neither a decoder nor an encoder-decoder, nor an encoder that fills "
            "in masked tokens or embeds text, and nothing else is compressed here"
        )
    if name.endswith("ForMaskedLM"):
        return "masked"
    if name.endswith("Model") and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "embedding"
    return "causal"


def auto_class(config: Any) -> Any:
    """The `transformers` class that makes such a model."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    return {
        "causal": AutoModelForCausalLM,
        "seq2seq": AutoModelForSeq2SeqLM,
        "masked": AutoModelForMaskedLM,
        "embedding": AutoModel,
    }[task_of(config)]


def halves(windows: T) -> tuple[T, T]:
    """What an encoder-decoder reads of windows (..., length), arrays or tensors, and what it is to give."""
    middle = windows.shape[-1] // 2
    return windows[..., :middle], windows[..., middle:]


def longest_text(model: Any) -> int:
    """The most tokens a `transformers` model takes; RoBERTa keeps its first positions for padding."""
    config = model.config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 2**31 - 1)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return longest - int(module.padding_idx) - 1
    return longest
