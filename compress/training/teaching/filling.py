"""A teacher of masked-LMs: what it believes the hidden tokens to be.

    loss = mean over hidden tokens of [(1 - w) D(teacher, student) + w cross-entropy] + what is matched inside

Tokens are hidden as in plain training (objectives/masked.py), and the teacher reads the same windows with the
same holes. Hidden states and relations are matched at all positions (Jiao et al. 2020, TinyBERT; Wang et al.
2020, MiniLMv2).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from compress.context import Context, Original
from compress.tasks.base import UNKNOWN
from compress.training.objectives.base import Moment, Objective
from compress.training.objectives.losses import chunked, distillation
from compress.training.objectives.masked import Chosen, masked_text
from compress.training.teaching.fields import Teaching
from compress.training.teaching.inner import Inner
from compress.training.teaching.teachers import Teachers


def hidden_taught(settings: Teaching, student: Original, context: Context) -> Objective:
    """The objective of filling in as the teachers do.

    Raises:
        UserError: no mask token; a teacher of another task or vocabulary.
    """
    name, window = settings.name(), settings.window or context.data.window
    loaded = settings.load_teachers(context.teacher)
    precision = settings.precision_on(context.precision)
    teachers = Teachers(student, loaded, context.device, precision, name, window)
    inner = Inner(settings, student.model, teachers, context.seed)
    chosen, w = Chosen(), settings.cross_entropy
    plain = masked_text(
        settings, student.model, student.tokenizer, context,
        share=settings.masked, whole_words=settings.whole_words, chosen=chosen, where=name,
    )  # fmt: skip

    def mixed(logits: Tensor, wanted: Tensor, text: Tensor) -> Tensor:
        return distillation(logits, wanted, text, settings.divergence, settings.temperature, w)

    def loss(outputs: Any, inputs: Mapping[str, Any], targets: Tensor, moment: Moment) -> Tensor:
        hidden, own = targets != UNKNOWN, outputs.logits
        chosen.places = hidden  # of the teachers' heads, too
        answers = [_at(output.logits, hidden)[:, : teachers.rows] for output in teachers.outputs(inputs)]
        chosen.places = None
        wanted = teachers.mixed([answer.contiguous() for answer in answers], settings.temperature)
        outer = chunked(mixed, _at(own, hidden), wanted, targets[hidden])
        return outer + inner.loss(moment, targets.device) if inner.notes else outer

    @contextmanager
    def watch(model: Any) -> Iterator[None]:
        with ExitStack() as during:
            during.enter_context(teachers.ready())
            during.enter_context(inner.watching(model))
            for each in (model, *teachers.models):
                during.enter_context(chosen.watch(each))
            yield

    pairs = zip(teachers.sources, teachers.weights, strict=True)
    notes = {**plain.notes, "teachers": [list(pair) for pair in pairs], **inner.notes}
    return replace(plain, loss=loss, watch=watch, extra=inner.maps, identity=teachers.digest, notes=notes)


def _at(logits: Tensor, hidden: Tensor) -> Tensor:
    """Logits of the hidden positions alone, (n, v), of a head that may have been given no others."""
    return logits if logits.dim() == 2 else logits[hidden]
