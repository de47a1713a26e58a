"""A teacher of encoder-decoders: what it would say next, of labelled sources or of plain text.

    loss = mean over target tokens of [(1 - w) D(teacher, student) + w cross-entropy]

Sources and targets are those of labelled rows, where there are any (objectives/texts.py); of plain text, and
of a share of the steps as `unlabelled` says, windows with spans taken out, or halves (objectives/spans.py).
Both read the same target so far. Nothing inside is matched: blocks of two lists have no common depth.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from compress.context import Context, Original
from compress.errors import UserError
from compress.tasks.base import UNKNOWN
from compress.tasks.seq2seq import SEQ2SEQ
from compress.training.objectives.base import Asked, Moment, Objective
from compress.training.objectives.losses import chunked, distillation
from compress.training.objectives.spans import spans_of_text
from compress.training.objectives.texts import texts_of_texts
from compress.training.teaching.fields import Teaching
from compress.training.teaching.sources import sources
from compress.training.teaching.teachers import Teachers


def answers_taught(settings: Teaching, student: Original, context: Context) -> Objective:
    """The objective of answering as the teachers do.

    Raises:
        UserError: too few sentinels for the spans; a teacher of another task or vocabulary; a share of plain
            text, where there is none.
    """
    name, window = settings.name(), settings.window or context.data.window
    loaded = settings.load_teachers(context.teacher)
    precision = settings.precision_on(context.precision)
    longest, own = _labelled(settings, student, context) or (window, _plain(settings, student, context))
    teachers = Teachers(student, loaded, context.device, precision, name, longest)
    w = settings.cross_entropy

    def mixed(logits: Tensor, wanted: Tensor, text: Tensor) -> Tensor:
        return distillation(logits, wanted, text, settings.divergence, settings.temperature, w)

    def loss(outputs: Any, inputs: Mapping[str, Any], targets: Tensor, moment: Moment) -> Tensor:
        right = targets.flatten()
        counts = right != UNKNOWN  # what is padded does not
        answers = [output.logits.flatten(0, 1)[counts] for output in teachers.outputs(inputs)]
        answers = [answer[:, : teachers.rows].contiguous() for answer in answers]
        wanted = teachers.mixed(answers, settings.temperature)
        return chunked(mixed, outputs.logits.flatten(0, 1)[counts], wanted, right[counts])

    @contextmanager
    def watch(model: Any) -> Iterator[None]:
        with teachers.ready():
            yield

    pairs = zip(teachers.sources, teachers.weights, strict=True)
    notes = {**own.notes, "teachers": [list(pair) for pair in pairs]}
    return replace(own, loss=loss, watch=watch, identity=teachers.digest, notes=notes)


def _plain(settings: Teaching, student: Original, context: Context) -> Objective:
    share, name = settings.spans, settings.name()
    return spans_of_text(settings, student.model, student.tokenizer, context, share=share, where=name)


def _labelled(settings: Teaching, student: Original, context: Context) -> tuple[int, Objective] | None:
    """Tokens of the longest text, and the objective of learning labelled rows with targets, and plain text
    between, without a teacher; None where there are no such rows.

    Raises:
        UserError: a share of plain text where there is no other, or where there is nothing else.
    """
    data, tokenizer, share = context.data.labelled, student.tokenizer, settings.unlabelled
    if data is None or data.kind != SEQ2SEQ.labels:
        if 0 < share < 1:
            raise UserError(
                f"{settings.name()}.unlabelled: there are no labelled rows with targets; give data.labelled, "
                "or leave it at 0"
            )
        return None
    found = sources(settings, context, tokenizer.pad_token_id or 0, field=settings.name())
    own = texts_of_texts(student.model, found.material, data.deciding, tokenizer, stop_by=settings.stop_by)
    notes: dict[str, Any] = {"unlabelled": share}
    if share < 1:
        notes |= {"examples": len(data.train), "cut_off": data.train.cut, "stop_by": settings.stop_by}
    if not share:
        return found.longest, replace(own, notes=notes)
    plain = _plain(settings, student, context)

    def ask(rows: Tensor, more: Mapping[str, Tensor], moment: Moment) -> Asked:
        return (plain if found.plain(moment.step) else own).ask(rows, more, moment)

    judged = plain if share == 1 else own
    both = replace(own, ask=ask, heldout=judged.heldout, notes={**plain.notes, **notes})
    return found.longest, both
