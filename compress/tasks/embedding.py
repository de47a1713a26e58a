"""embedding: an encoder without a head (MiniLM): a text is the mean of its last hidden states."""

from typing import Any, ClassVar, Literal

from compress.tasks.base import Question, Task, Window


class Embedding(Task):
    """To embed text."""

    name: ClassVar[str] = "embedding"
    noun: ClassVar[str] = "an encoder"
    auto_class: ClassVar[str] = "AutoModel"
    output: ClassVar[Literal["logits", "last_hidden_state"]] = "last_hidden_state"
    predicts: ClassVar[bool] = False

    def claims(self, config: Any, architecture: str) -> bool:
        """A model of a kind that could have a masked-LM head, and has none."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        return architecture.endswith("Model") and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES

    def question(self, window: Window, index: int, mask_token: int | None = None) -> Question:
        """The whole window; nothing is predicted."""
        return Question(window, slice(None), window)


EMBEDDING = Embedding()
