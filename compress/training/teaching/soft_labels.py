"""Soft labels: what a teacher makes of each label, beside the one that is right.

    loss = (1 - w) D + w L          L the loss of the right label (objectives/labelled.py)

    one label         D = T^2 KL(softmax(y / T) || softmax(z / T)), or another divergence; y the
                      teacher's logits, z the student's
    of words          its mean over those that carry a label; in plain text over the first pieces of words
    several labels    D = T^2 times the mean over labels of KL(sigmoid(y / T) || sigmoid(z / T)), each label a
                      distribution over yes and no, which is softmax((z, 0) / T)
    a number          D = (z - y)^2
    an answer         D the mean over both ends, each a distribution over the tokens of the text

Hinton, Vinyals & Dean 2015. Plain text (`unlabelled`) has no right label: there w is 0. Hidden states and
relations besides, as of other models (inner.py); padding counts for nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.context import Context, Original
from compress.errors import UserError
from compress.models.heads import labels_of
from compress.models.running import Precision, autocast, evaluating
from compress.tasks.base import UNKNOWN, rows_of
from compress.tasks.registry import task_of
from compress.training.objectives.base import Asked, Moment, Objective
from compress.training.objectives.labelled import ask as labelled_ask
from compress.training.objectives.labelled import heldout_loss, label_loss, logits_of
from compress.training.objectives.losses import DIVERGENCES, Divergence
from compress.training.objectives.masked import follows
from compress.training.teaching.fields import Teaching
from compress.training.teaching.inner import Inner
from compress.training.teaching.sources import Sources, sources
from compress.training.teaching.teachers import Teachers

_TOGETHER = 16  # held-out windows per forward pass


def labels_taught(settings: Teaching, student: Original, context: Context) -> Objective:
    """The objective of a model with labels.

    Raises:
        UserError: labels of another kind than the model's, or none; a teacher of another task, or that
            numbers its labels otherwise.
    """
    name, task = settings.name(), task_of(student.model.config)
    _require_labels(settings, student, context)
    padding = student.tokenizer.pad_token_id or 0
    found = sources(settings, context, padding, field=name)
    precision = settings.precision_on(context.precision)
    loaded = settings.load_teachers(context.teacher)
    teachers = Teachers(student, loaded, context.device, precision, name, found.longest)
    for bundle, _ in loaded:
        require_same_labels(name, student.model.config, bundle)
    inner = Inner(settings, student.model, teachers, context.seed)
    taught = _Taught(settings, student, teachers, inner, found, padding)

    def judge(model: Any, precision: Precision) -> float:
        if found.labelled is None:
            return taught.heldout(model, context.data.heldout.tokens, precision)
        held, kind = found.labelled.deciding, found.labelled.train.loss_kind
        return heldout_loss(model, task, held, padding, precision, settings.stop_by, kind)

    notes: dict[str, Any] = {
        "teachers": [list(pair) for pair in zip(teachers.sources, teachers.weights, strict=True)],
        "task": task.name,
        "unlabelled": settings.unlabelled,
    }
    if found.labelled is not None:
        notes |= {"examples": len(found.labelled.train), "cut_off": found.labelled.train.cut}
        notes["stop_by"] = settings.stop_by
    return Objective(
        taught.loss, extra=inner.maps, watch=taught.watch, ask=taught.ask, material=found.material,
        heldout=judge, identity=teachers.digest, notes=notes | inner.notes,
    )  # fmt: skip


def soft_loss(
    kind: str, student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float
) -> Tensor:
    """D of the module's text, of rows as `rows_for` gives them: (n, k) each -> scalar; 0 of no row."""
    if not len(student):
        return student.sum()
    if kind == "number":
        return F.mse_loss(student, teacher)
    return DIVERGENCES[divergence](student, teacher, temperature)


def rows_for(kind: str, logits: Tensor, carries: Tensor | None = None) -> Tensor:
    """Logits of distributions, (n, k), or numbers (n, 1).

    Args:
        kind: of the labels.
        logits: (texts, labels), of words (texts, length, labels), of answers (texts, length, 2).
        carries: (texts, length), True at the words that count.
    """
    if kind == "tags":
        return logits[carries]
    if kind == "span":
        return logits.transpose(1, 2).flatten(0, 1)
    if kind == "classes":
        return torch.stack([logits, torch.zeros_like(logits)], -1).flatten(0, 1)
    return logits


def require_same_labels(name: str, student: Any, teacher: Original) -> None:
    """Refuse a teacher whose answers stand for other labels than the student's; `student`: configuration.

    Raises:
        UserError: names the first that differs.
    """
    source = teacher.lineage.source
    ours, theirs = labels_of(student), labels_of(teacher.model.config)
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        raise UserError(
            f"{name}: the teacher '{source}' has {len(theirs)} labels and the student {len(ours)}; take a "
            "teacher of the same labels"
        )
    place = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    raise UserError(
        f"{name}: label {place} of the teacher '{source}' is '{theirs[place]}' and of the student "
        f"'{ours[place]}'; both must number their labels alike: distil from the model that the student was "
        "made of"
    )


class _Taught:
    """A student beside its teachers."""

    def __init__(
        self,
        settings: Teaching,
        student: Original,
        teachers: Teachers,
        inner: Inner,
        found: Sources,
        padding: int,
    ) -> None:
        self.settings, self.teachers, self.inner, self.found = settings, teachers, inner, found
        self.padding, self.task = padding, task_of(student.model.config)
        self.kind = str(self.task.labels)
        self.hard = label_loss(self.kind if found.labelled is None else found.labelled.train.loss_kind)
        self.not_words: Tensor | None = None
        if self.kind == "tags" and (settings.unlabelled or found.labelled is None):
            self.not_words = _not_words(student, f"{settings.name()}.unlabelled")

    @contextmanager
    def watch(self, student: Any) -> Iterator[None]:
        """While the student trains."""
        with ExitStack() as during:
            for model in (student, *self.teachers.models):
                during.enter_context(_padding(model, self.padding))
            during.enter_context(self.teachers.ready())
            during.enter_context(self.inner.watching(student))
            yield

    def ask(self, rows: Tensor, more: Mapping[str, Tensor], moment: Moment) -> Asked:
        """Padded examples, or windows of plain text, of which nothing is known."""
        if not self.found.plain(moment.step):
            return labelled_ask(rows, more, moment)
        return Asked({"input_ids": rows}, self._words(rows))

    def loss(self, outputs: Any, inputs: Mapping[str, Any], targets: Tensor, moment: Moment) -> Tensor:
        """See the module's text."""
        w = 0.0 if self.found.plain(moment.step) else self.settings.cross_entropy
        logits, mask = logits_of(self.task, outputs, inputs), inputs.get("attention_mask")
        total = (1 - w) * self.soft(logits, inputs, targets)
        if w and (self.kind == "number" or bool((targets != UNKNOWN).any())):
            total = total + w * self.hard(logits, targets)
        return total + self.inner.loss(moment, logits.device, mask) if self.inner.notes else total

    def soft(self, logits: Tensor, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
        """D, of student's logits and what the teachers say of the same texts."""
        carries = targets != UNKNOWN if self.kind == "tags" else None
        said = [logits_of(self.task, outputs, inputs) for outputs in self.teachers.outputs(inputs)]
        answers = [rows_for(self.kind, logits, carries) for logits in said]
        if self.kind == "number":
            pairs = zip(answers, self.teachers.weights, strict=True)
            wanted = torch.stack([weight * answer for answer, weight in pairs]).sum(0)
        else:
            wanted = self.teachers.mixed(answers, self.settings.temperature)
        own = rows_for(self.kind, logits, carries)
        return soft_loss(self.kind, own, wanted, self.settings.divergence, self.settings.temperature)

    @torch.no_grad()
    def heldout(self, model: Any, windows: Any, precision: Precision) -> float:
        """D on held-out windows of plain text, where no labels are known."""
        total, device = 0.0, self.teachers.device
        with evaluating(model):
            for rows in torch.from_numpy(windows.astype(np.int64)).to(device).split(_TOGETHER):
                with autocast(device, precision):
                    logits = logits_of(self.task, model(input_ids=rows), {})
                total += float(self.soft(logits, {"input_ids": rows}, self._words(rows))) * len(rows)
        return total / len(windows)

    def _words(self, rows: Tensor) -> Tensor:
        """In the place of targets: 0 at the first pieces of words, UNKNOWN elsewhere."""
        found = torch.zeros_like(rows)
        return (
            found
            if self.not_words is None
            else found.masked_fill(self.not_words[rows.cpu()].to(rows.device), UNKNOWN)
        )


def _not_words(student: Original, field: str) -> Tensor:
    """Which tokens begin no word: specials, and what goes on with the word before; (vocabulary,)."""
    tokenizer = student.tokenizer
    found = follows(tokenizer, rows_of(student.model.config) or len(tokenizer), field)
    found[tokenizer.all_special_ids] = True
    return torch.from_numpy(found)


def _require_labels(settings: Teaching, student: Original, context: Context) -> None:
    """The labelled texts are of the model's kind of label and numbered as it numbers them."""
    name, config, labelled = settings.name(), student.model.config, context.data.labelled
    task = task_of(config)
    if labelled is None:
        if settings.unlabelled < 1:
            raise UserError(
                f"{name}: {task.noun} learns from labelled texts, and there are none; give data.labelled, or "
                "unlabelled: 1 to learn what the teacher says of plain text"
            )
        return
    if labelled.kind != task.labels:
        raise UserError(
            f"{name}: the labels of {labelled.source} are of the kind '{labelled.kind}', and the model is "
            f"{task.noun} ({task}); give labels that fit its head"
        )
    own = labels_of(config)
    if labelled.names != own:
        raise UserError(
            f"{name}: the model has {len(own)} labels ({', '.join(own[:3])} ...) and {labelled.source} "
            f"{len(labelled.names)} ({', '.join(labelled.names[:3])} ...); they must be alike, in one order"
        )


@contextmanager
def _padding(model: Any, padding: int) -> Iterator[None]:
    """Let a decoder's classifier, which looks for a text's last token, know what padding is."""
    before = model.config.pad_token_id
    model.config.pad_token_id = padding if before is None else before
    try:
        yield
    finally:
        model.config.pad_token_id = before
