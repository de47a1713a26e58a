"""What a teacher teaches, by what its model is for: the objective of each task, chosen here and nowhere else.

    a decoder              next tokens (distillation.py)
    an encoder             hidden tokens (filling.py), or where texts lie (embedding.py)
    an encoder-decoder     target tokens (answering.py)
    a model with labels    soft labels (soft_labels.py)

Student and teacher are for the same, and number their labels alike.
"""

from collections.abc import Callable, Mapping

from compress.context import Context, Original
from compress.errors import UserError
from compress.tasks.base import Task
from compress.tasks.causal import CAUSAL
from compress.tasks.embedding import EMBEDDING
from compress.tasks.masked import MASKED
from compress.tasks.registry import TASKS, task_of
from compress.tasks.seq2seq import SEQ2SEQ
from compress.tasks.sequence_classification import REGRESSION
from compress.training.objectives.base import Objective
from compress.training.teaching.answering import answers_taught
from compress.training.teaching.distillation import distillation_objective
from compress.training.teaching.embedding import embeddings_taught
from compress.training.teaching.fields import Teaching
from compress.training.teaching.filling import hidden_taught
from compress.training.teaching.soft_labels import labels_taught

_LABELLED = frozenset(task for task in TASKS if task.labels is not None)
_INNER = ("hidden", "hidden_pairs", "relations", "relation_blocks", "relation_heads", "fade")
# field -> the tasks that it means something to
_OF: Mapping[str, frozenset[Task]] = {
    **dict.fromkeys(("unlabelled",), _LABELLED | {EMBEDDING}),
    **dict.fromkeys(("stop_by",), _LABELLED),
    **dict.fromkeys(("masked", "whole_words"), frozenset({MASKED})),
    **dict.fromkeys(("spans",), frozenset({SEQ2SEQ})),
    **dict.fromkeys(("cosine", "similarity"), frozenset({EMBEDDING})),
    **dict.fromkeys(("targets", "samples", "on_policy", "prompt"), frozenset({CAUSAL})),
    **dict.fromkeys(("divergence", "temperature"), TASKS - {REGRESSION, EMBEDDING}),
    **dict.fromkeys(("cross_entropy",), TASKS - {EMBEDDING}),
    **dict.fromkeys(_INNER, TASKS - {SEQ2SEQ}),
}

Teach = Callable[[Teaching, Original, Context], Objective]


def require_fields(settings: Teaching, task: Task) -> None:
    """Refuse a field that would be heeded by nobody.

    Raises:
        UserError: names the field.
    """
    for name, tasks in _OF.items():
        if task not in tasks and getattr(settings, name) != type(settings).model_fields[name].default:
            nouns = ", ".join(sorted(str(each) for each in tasks))
            raise UserError(
                f"{settings.name()}.{name}: is for the tasks {nouns}, and this is {task.noun} ({task}); "
                "leave it out"
            )


def teaching_objective(settings: Teaching, student: Original, context: Context) -> Objective:
    """The objective of learning from the teachers that `settings` names.

    Raises:
        UserError: a field of another task; a teacher of another task, vocabulary or order of labels; texts
            that are not there.
    """
    task = task_of(student.model.config)
    require_fields(settings, task)
    special: Mapping[Task, Teach] = {
        CAUSAL: distillation_objective,
        MASKED: hidden_taught,
        SEQ2SEQ: answers_taught,
        EMBEDDING: embeddings_taught,
    }
    return special.get(task, labels_taught)(settings, student, context)
