"""Whether a recipe's labelled rows fit its model and its steps: asked before any work."""

from pathlib import Path
from typing import Any

import torch

from compress.artifact.folder import whole
from compress.artifact.labels import fitted
from compress.errors import UserError, staying
from compress.host.files import at_home
from compress.models.checkpoints import meta_model
from compress.models.heads import numbering, with_head, without_head
from compress.passes.base import Pass
from compress.run.recipe import Recipe
from compress.tasks.decisions import require_metrics
from compress.tasks.embedding import Embedding
from compress.tasks.registry import task_learnt, task_of
from compress.text.labelled.base import Labelled
from compress.text.labelled.encoded import paired
from compress.text.labelled.load import load_labelled
from compress.text.windows import LABELLED
from compress.training.teaching.fields import TaskFields

_CHARACTERS = 4  # of a token, about


def epoch_tokens(labels: Labelled | None, longest: int) -> int:
    """About how many tokens the rows to learn from have, of which none has more than the longest text."""
    rows = () if labels is None else labels.train
    targets = labels is not None and labels.kind == "text"
    texts = [text for row in rows for text in (row.text + (row.pair or ""), str(row.label) * targets) if text]
    return sum(min(longest, 2 + len(text) // _CHARACTERS) for text in texts)


def labels_of(recipe: Recipe, model: Any) -> Labelled | None:
    """The labelled rows, which can be read and are numbered as the model's head does."""
    if recipe.data.labelled is None:
        return None
    require_metrics("data.labelled")
    labelled = fitted(load_labelled(recipe.data.labelled, recipe.seed), model.config)
    require_metrics("data.labelled", labelled.kind)
    numbering(model.config, labelled.kind, labelled.names)
    return labelled


def check_labels(recipe: Recipe, labels: Labelled | None, step: Pass, model: Any, where: str) -> None:
    """Refuse a step that cannot take this model without labelled texts, or without other text besides."""
    task = task_of(model.config)
    if labels is None and step.wants_labels(task):
        raise UserError(
            f"{where}: {task.noun} learns from labelled texts, and there are none; give data.labelled"
        )
    if labels is not None and step.wants_labels(task) and task.labels != labels.kind:
        raise UserError(
            f"{where}: the labels of {labels.source} are of the kind '{labels.kind}', and the model is "
            f"{task.noun} ({task}); give labels that fit its head"
        )
    learns = labels is not None and "labelled" in step.requires()
    if learns and labels is not None and (reason := step.refuses_labels(labels.kind)) is not None:
        raise UserError(f"{where}.{reason}")
    if (
        labels is not None
        and recipe.data.text == LABELLED
        and isinstance(step, TaskFields)
        and step.unlabelled
    ):
        raise UserError(
            f"{where}.unlabelled: there is no text but that of the labelled rows; give another as data.text, "
            "or leave it at 0"
        )


def check_prompt(recipe: Recipe, labels: Labelled | None, base: Any) -> None:
    """Refuse a template that nobody is asked by, and a decoder beside that cannot be asked."""
    decoder, task = recipe.report.likelihood, task_of(base.config)
    asked = recipe.data.labelled is not None and recipe.data.labelled.template is not None
    if decoder is not None and not asked:
        raise UserError(
            f"report.likelihood: {decoder} is asked by data.labelled.template, which is not given; write a "
            "prompt with {text} that ends with {label}"
        )
    if labels is None or not asked:
        return
    if labels.kind != "class":
        raise UserError(
            f"data.labelled.template: asks for one label of a text, and the labels of {labels.source} are of "
            f"the kind '{labels.kind}'; leave it out"
        )
    by_head = task.judged_by(labels.kind)
    if not by_head and not task.continues:
        raise UserError(
            f"data.labelled.template: {task.noun} ({task}) is not asked so, only a decoder; leave it out"
        )
    if by_head and decoder is None:
        raise UserError(
            "data.labelled.template: the base has a head for labels, so nobody is asked; name a decoder "
            "under report.likelihood, or leave it out"
        )
    if not by_head and decoder is not None:
        raise UserError(
            f"report.likelihood: {decoder} would stand beside a base with a head for labels, and this base "
            "is itself asked by the template; leave it out"
        )
    if decoder is not None:
        place = str(at_home(decoder))
        if not (its := task_of(meta_model(str(whole(Path(place)))).config)).continues:
            raise UserError(
                f"report.likelihood: {decoder} is {its.noun} ({its}), which finds no label likely after a "
                "text; give a decoder"
            )


def headed(model: Any, labels: Labelled | None, pooling: str | None, where: str) -> Any:
    """The model, without data, that learns these labels; `pooling`: as the step says."""
    if labels is None:
        raise UserError(f"{where}: learns labels, and there are none; give data.labelled")
    task = task_learnt(model.config, labels.kind, paired=paired(labels.train), pooling=pooling)
    if task is None:
        raise UserError(f"{where}: labels of the kind '{labels.kind}' are not learnt here")
    if isinstance(task, Embedding):
        with torch.device("meta"), staying(where):
            return without_head(model, task)
    if pooling is not None:
        raise UserError(
            f"{where}.pooling: is of pairs of texts that are embedded, and {labels.source} has labels of the "
            f"kind '{labels.kind}'; set labelled.kind to pair, or leave it out"
        )
    with torch.device("meta"), staying(where):
        return with_head(model, task, numbering(model.config, labels.kind, labels.names), 0)


def check_pairs(labels: Labelled | None, base: Any) -> None:
    """Refuse a base that embeds texts, and rows of one text, which say nothing of how good it is."""
    task = task_of(base.config)
    if labels is not None and task.embeds and labels.kind == "number" and not paired(labels.train):
        raise UserError(
            f"labelled.pair: {labels.source} has one text in each row, and the base is {task.noun} that "
            "embeds texts, which is judged by two; name the column of the second, or fine-tune the base on "
            "the numbers"
        )


def check_judged(labels: Labelled | None, base: Any) -> None:
    """Refuse labels that a base with a head for others would not be judged by: they would be plain text."""
    task = task_of(base.config)
    if labels is not None and task.labels not in (None, labels.kind):
        raise UserError(
            f"data.labelled: the labels of {labels.source} are of the kind '{labels.kind}', and the base is "
            f"{task.noun} ({task}); give labels that fit its head, or put finetune into the base"
        )
