"""A head for labels on a model that has another, or none.

The body, what `transformers` calls the base model, keeps its weights; the head is new, its weights drawn from
a seed. A body whose pooler was not saved gets a new one of those too.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from compress.errors import UserError
from compress.models.checkpoints import quiet_transformers
from compress.models.conv1d import linears
from compress.models.tying import settled
from compress.tasks.base import Task
from compress.tasks.embedding import Embedding
from compress.tasks.registry import task_of

_T = TypeVar("_T")
_NAMELESS = {"number": 1, "span": 2}  # kinds of labels without names: how many numbers their heads give
_PROBLEMS = {
    "class": "single_label_classification",
    "classes": "multi_label_classification",
    "number": "regression",
}


def with_head(model: Any, task: Task, names: Sequence[str], seed: int) -> Any:
    """A model of the task with the body of `model`, which stays as it is; itself where it is of the task
    and has these labels, or the task needs none.

    Args:
        model: a `transformers` model in float32.
        task: what the head is for; has `labels`.
        names: of the labels, in the order of their numbers; empty where they have none.
        seed: of the new weights.

    Raises:
        UserError: `transformers` has no such head for this kind of model; the model has a head of the task
            with other labels; or the task has no labels, and the model is for another.
    """
    import transformers

    own = task_of(model.config)
    if own is task and (task.labels is None or labels_of(model.config) == tuple(names)):
        return model
    if task.labels is None or own.stacks != task.stacks:  # a head, or a decoder, would be made up
        raise UserError(
            f"finetune: rows of the kind '{task.labels or task.rows}' are learnt by {task.noun} ({task}), "
            f"and this model is {own.noun} ({own}); take another model, or other rows"
        )
    config = copy.deepcopy(model.config)
    nameless = [f"LABEL_{number}" for number in range(_NAMELESS.get(str(task.labels), 0))]
    config.id2label = dict(enumerate(names or nameless))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = _PROBLEMS.get(str(task.labels))
    kind = getattr(transformers, task.auto_class)
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(seed)
            made = linears(kind.from_config(config, dtype=torch.float32))
    except ValueError:
        raise UserError(
            f"finetune: transformers has no {task} head for model_type '{config.model_type}'; take another"
        ) from None
    made.config.architectures = [type(made).__name__]
    body = _body(model).state_dict()
    own = _body(made).state_dict()
    missing = sorted(name for name in own if name not in body and "pooler." not in name)
    if missing:
        raise UserError(
            f"finetune: a {type(made).__name__} has '{missing[0]}', and the model has no such part"
        )
    _body(made).load_state_dict({name: body[name] for name in own if name in body}, strict=False)
    return settled(made).eval()


def without_head(model: Any, task: Embedding) -> Any:
    """A model that embeds with the body of `model`, which stays as it is; itself where it does so.

    Raises:
        UserError: no encoder, which alone embeds here.
    """
    import transformers

    if task_of(model.config) is task:
        return model
    config = copy.deepcopy(model.config)
    config.pooling, config.problem_type = task.pooling, None
    if task_of(model.config).embeds:  # of the same states, pooled in another way
        own = copy.deepcopy(model)
        own.config = config
        return own
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(0)  # of a pooler, which nothing reads
            made = linears(getattr(transformers, task.auto_class).from_config(config, dtype=torch.float32))
        made.config.architectures = [type(made).__name__]
        known = task_of(made.config) is task
    except (ValueError, UserError):
        known = False
    if not known:
        raise UserError(
            f"finetune: pairs teach an encoder to embed, and this is {task_of(model.config).noun} of "
            f"model_type '{config.model_type}'; give an encoder (BERT, RoBERTa, ModernBERT ...)"
        )
    body, own = _body(model).state_dict(), made.state_dict()
    made.load_state_dict({name: body[name] for name in own if name in body}, strict=False)
    return settled(made).eval()


def renamed(found: Mapping[str, _T], before: Any, after: Any) -> dict[str, _T]:
    """What belongs to modules of a body, by the names that they have under another head."""
    old, new = (f"{m.base_model_prefix}." if hasattr(m, m.base_model_prefix) else "" for m in (before, after))
    return {new + name.removeprefix(old) if name.startswith(old) else name: v for name, v in found.items()}


def numbering(config: Any, kind: str, names: Sequence[str]) -> tuple[str, ...]:
    """The labels of data in the order in which a model numbers them: its own, where it has a head for labels
    of this kind, of which the data's must be some; else the data's.

    Raises:
        UserError: the model has a head of the kind, with other labels.
    """
    own = labels_of(config)
    if task_of(config).labels != kind or not names:
        return tuple(names)
    unknown = [name for name in names if name not in own]
    if not unknown:
        return own
    raise UserError(
        f"labelled.label: '{unknown[0]}' is none of the {len(own)} labels that the model has "
        f"({', '.join(own[:5])}{' ...' if len(own) > 5 else ''}); write the model's names into the data, or "
        "give a model without this head"
    )


def labels_of(config: Any) -> tuple[str, ...]:
    """The names of a configuration's labels, in the order of their numbers; none of a regression's one, of
    an answer's ends, of a model that writes texts, and of one without a head for labels."""
    names = {int(number): str(name) for number, name in (getattr(config, "id2label", None) or {}).items()}
    found = tuple(names[number] for number in sorted(names))
    own = task_of(config).labels
    return () if own in (None, "text", *_NAMELESS) else found


def outside_body(model: Any) -> list[Any]:
    """The parameters of a model's head, and of the pooler before it."""
    body = {id(p) for p in _body(model).parameters()}
    pooler = {id(p) for name, p in model.named_parameters() if ".pooler." in f".{name}"}
    return [p for p in model.parameters() if id(p) not in body or id(p) in pooler]


def _body(model: Any) -> Any:
    return getattr(model, model.base_model_prefix, model)
