"""All tasks, and which of them a model has."""

from typing import Any

from compress.errors import UserError
from compress.tasks.base import Task
from compress.tasks.causal import CAUSAL
from compress.tasks.embedding import EMBEDDING, EMBEDDING_CLS, EMBEDDING_LAST
from compress.tasks.masked import MASKED
from compress.tasks.next_sentence import MASKED_NEXT
from compress.tasks.prompted import PROMPTED
from compress.tasks.question_answering import QUESTION_ANSWERING
from compress.tasks.seq2seq import SEQ2SEQ
from compress.tasks.sequence_classification import MULTI_LABEL, REGRESSION, SEQUENCE_CLASSIFICATION
from compress.tasks.token_classification import TOKEN_CLASSIFICATION

# In the order in which they are asked whether a model is theirs: the last takes what is left.
_IN_ORDER: tuple[Task, ...] = (
    *(SEQUENCE_CLASSIFICATION, MULTI_LABEL, REGRESSION, TOKEN_CLASSIFICATION),
    QUESTION_ANSWERING,
    *(SEQ2SEQ, MASKED, MASKED_NEXT, EMBEDDING, EMBEDDING_CLS, EMBEDDING_LAST, CAUSAL),
)

EMBEDDINGS = (EMBEDDING, EMBEDDING_CLS, EMBEDDING_LAST)
TASKS: frozenset[Task] = frozenset(_IN_ORDER)
ONE_STACK = frozenset(task for task in TASKS if task.stacks == 1)  # of models with one list of blocks


def task_of(config: Any) -> Task:
    """The task of a `transformers` configuration.

    Raises:
        UserError: it is of a classifier or the like, of which another head would be made up.

    >>> from transformers import BertConfig
    >>> [task_of(BertConfig(architectures=[name])).name for name in ("BertForMaskedLM", "BertModel")]
    ['masked', 'embedding']
    """
    architecture = str((getattr(config, "architectures", None) or [""])[0])
    found = next((task for task in _IN_ORDER if task.claims(config, architecture)), None)
    if found is None:
        raise UserError(
            f"architectures: {architecture} is neither a decoder nor an encoder-decoder, nor an encoder that "
            "fills in masked tokens, labels texts or words, finds answers or embeds text; nothing else is "
            "compressed here"
        )
    return found


def task_labelled(kind: str) -> Task | None:
    """The task that is judged by labels of a kind, as `compress.text.labelled` calls it."""
    return next((task for task in _IN_ORDER if task.judged_by(kind)), None)


def task_learnt(config: Any, kind: str, *, paired: bool = False, pooling: str | None = None) -> Task | None:
    """The task of which a model becomes that learns labels of a kind.

    Pairs without a label teach how texts are embedded; so do pairs with a number where the model says how it
    pools its states, as a sentence-transformer's files do, or somebody does. Else a head is for the labels.

    Args:
        config: of the model as it is.
        kind: of the labels.
        paired: whether rows have two texts.
        pooling: of the states, as somebody wants it; None: as the model says, else their mean.
    """
    pools = pooling or getattr(config, "pooling", None)
    if kind == "pair" or (kind == "number" and paired and pools):
        return next((task for task in EMBEDDINGS if task.pooling == (pools or EMBEDDING.pooling)), None)
    return task_labelled(kind)


def task_named(name: Any) -> Task | None:
    """The task that a record names; None where it names none."""
    return next((task for task in (*_IN_ORDER, PROMPTED) if task.name == name), None)


def auto_class(config: Any) -> Any:
    """The `transformers` class that makes such a model."""
    import transformers

    return getattr(transformers, task_of(config).auto_class)
