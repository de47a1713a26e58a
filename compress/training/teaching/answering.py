"""A teacher of encoder-decoders: what it would say next, of sources and texts as plain training has them.

    loss = mean over target tokens of [(1 - w) D(teacher, student) + w cross-entropy]

Sources are windows with spans taken out, or first halves (objectives/spans.py); both read the same target so
far. Nothing inside is matched: blocks of two lists have no common depth.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from compress.context import Context, Original
from compress.training.objectives.base import Moment, Objective
from compress.training.objectives.losses import chunked, distillation
from compress.training.objectives.spans import spans_of_text
from compress.training.teaching.fields import Teaching
from compress.training.teaching.teachers import Teachers


def answers_taught(settings: Teaching, student: Original, context: Context) -> Objective:
    """The objective of answering as the teachers do.

    Raises:
        UserError: too few sentinels for the spans; a teacher of another task or vocabulary.
    """
    name, window = settings.name(), settings.window or context.data.window
    loaded = settings.load_teachers(context.teacher)
    precision = settings.precision_on(context.precision)
    teachers = Teachers(student, loaded, context.device, precision, name, window)
    plain = spans_of_text(
        settings, student.model, student.tokenizer, context, share=settings.spans, where=name
    )
    w = settings.cross_entropy

    def mixed(logits: Tensor, wanted: Tensor, text: Tensor) -> Tensor:
        return distillation(logits, wanted, text, settings.divergence, settings.temperature, w)

    def loss(outputs: Any, inputs: Mapping[str, Any], targets: Tensor, moment: Moment) -> Tensor:
        answers = [output.logits.flatten(0, 1)[:, : teachers.rows] for output in teachers.outputs(inputs)]
        wanted = teachers.mixed([answer.contiguous() for answer in answers], settings.temperature)
        return chunked(mixed, outputs.logits.flatten(0, 1), wanted, targets.flatten())

    @contextmanager
    def watch(model: Any) -> Iterator[None]:
        with teachers.ready():
            yield

    pairs = zip(teachers.sources, teachers.weights, strict=True)
    notes = {**plain.notes, "teachers": [list(pair) for pair in pairs]}
    return replace(plain, loss=loss, watch=watch, identity=teachers.digest, notes=notes)
