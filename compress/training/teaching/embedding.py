"""A teacher of encoders that embed: where its texts lie, each by itself and among the others of the batch.

    loss = a mean over texts of [1 - cos(W s, t)]
         + b mean over pairs i != j of [cos(s_i, s_j) - cos(t_i, t_j)]^2
         + what is matched inside

s and t are what the model's task makes of a text's last hidden states, their mean by default; W is learnt
beside where the widths differ, and then thrown away, so that there the similarity matrix alone fixes what
the student itself gives (Tung & Mori 2019, similarity-preserving distillation; Reimers & Gurevych 2020).
Texts are the labelled ones, where there are any, or windows of plain text. The held-out loss is the first
two terms on held-out texts.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.context import Context, Original
from compress.errors import UserError
from compress.models.running import Precision, autocast, evaluating
from compress.tasks.base import longest_text
from compress.tasks.embedding import Embedding
from compress.tasks.registry import task_of
from compress.training.example_batches import padded
from compress.training.objectives.base import Asked, Moment, Objective
from compress.training.teaching.fields import Teaching
from compress.training.teaching.inner import Inner, linear_map
from compress.training.teaching.sources import Sources, sources
from compress.training.teaching.teachers import Teachers

_TOGETHER = 32  # held-out texts per forward pass


def embeddings_taught(settings: Teaching, student: Original, context: Context) -> Objective:
    """The objective of embedding as the teacher does.

    Raises:
        UserError: several teachers, or one of another task or vocabulary; nothing that is asked for.
    """
    name = settings.name()
    if not (settings.cosine or settings.similarity or settings.hidden or settings.relations):
        raise UserError(f"{name}.cosine: with all weights at 0 nothing is learnt; give one")
    loaded = settings.load_teachers(context.teacher)
    if len(loaded) > 1:
        raise UserError(f"{name}.teachers: several place their texts each in its own way; give one")
    padding = student.tokenizer.pad_token_id or 0
    labelled = context.data.labelled
    if labelled is not None and labelled.kind == "number" and labelled.paired:
        own = labelled.apart(student.tokenizer, longest_text(student.model), wanted=True)
        context = replace(context, data=replace(context.data, labelled=own))
    found = sources(settings, context, padding, field=name)
    precision = settings.precision_on(context.precision)
    teachers = Teachers(student, loaded, context.device, precision, name, found.longest)
    inner = Inner(settings, student.model, teachers, context.seed)
    task = task_of(student.model.config)
    assert isinstance(task, Embedding)
    states = task.states
    small, large = (model.config.hidden_size for model in (student.model, teachers.models[0]))
    generator = torch.Generator().manual_seed(context.seed)
    through = nn.Identity() if small == large else linear_map(small, large, generator)

    def ask(rows: Tensor, more: Mapping[str, Tensor], moment: Moment) -> Asked:
        given = {key: value for key, value in more.items() if key != "targets"}
        return Asked({"input_ids": rows, **given}, rows)

    def apart(student: Tensor, teacher: Tensor) -> Tensor:
        total = torch.zeros((), device=student.device)
        if settings.cosine:
            total = total + settings.cosine * cosine_distance(through(student), teacher)
        return total + settings.similarity * similarity_distance(student, teacher)

    def outer(output: Any, inputs: Mapping[str, Any]) -> Tensor:
        mask = inputs.get("attention_mask")
        teacher = teachers.outputs(inputs)[0]
        return apart(pooled(output[0], mask, states), pooled(teacher[0], mask, states))

    def loss(outputs: Any, inputs: Mapping[str, Any], targets: Tensor, moment: Moment) -> Tensor:
        total = outer(outputs, inputs)
        if not inner.notes:
            return total
        return total + inner.loss(moment, targets.device, inputs.get("attention_mask"))

    @torch.no_grad()
    def heldout(model: Any, precision: Precision) -> float:
        total, count = 0.0, 0
        with evaluating(model):
            for inputs in _heldout_inputs(found, context, padding, teachers.device):
                with autocast(teachers.device, precision):
                    output = model(**inputs)
                texts = len(inputs["input_ids"])
                total, count = total + float(outer(output, inputs)) * texts, count + texts
        return total / count

    @contextmanager
    def watch(model: Any) -> Iterator[None]:
        with ExitStack() as during:
            during.enter_context(teachers.ready())
            during.enter_context(inner.watching(model))
            yield

    notes: dict[str, Any] = {
        "teachers": [list(pair) for pair in zip(teachers.sources, teachers.weights, strict=True)],
        "learnt_from": "plain text" if found.labelled is None else found.labelled.source,
        "unlabelled": settings.unlabelled,
    }
    return Objective(
        loss, extra=nn.ModuleList([*inner.maps, through]), watch=watch, ask=ask, material=found.material,
        heldout=heldout, identity=teachers.digest, notes=notes | inner.notes,
    )  # fmt: skip


def pooled(states: Tensor, mask: Tensor | None, chosen: slice = slice(None)) -> Tensor:
    """The mean of the states of each text that count, (texts, length, width) -> (texts, width).

    Args:
        states: last hidden states.
        mask: (texts, length), nonzero where a text is, beginning on the left; None: everywhere.
        chosen: of a text's states those that count: all, the first, or the last.
    """
    states = states.float()
    mask = torch.ones(states.shape[:2], device=states.device) if mask is None else mask
    counted = torch.zeros_like(mask, dtype=torch.float32)
    for row, length in enumerate(mask.sum(1).tolist()):
        counted[row, : int(length)][chosen] = 1.0
    return (states * counted.unsqueeze(-1)).sum(1) / counted.sum(1, keepdim=True)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over texts of 1 - cos: (n, d), (n, d) -> scalar."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


def similarity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over ordered pairs i != j of (cos_ij of one - cos_ij of the other)^2: (n, d), (n, e) -> scalar; 0
    of one text."""
    n = len(student)
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    return ((s @ s.T - t @ t.T) ** 2).sum() / max(1, n * (n - 1))  # the diagonals are alike


def _heldout_inputs(
    found: Sources, context: Context, padding: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Held-out texts, labelled ones where those are learnt from, as inputs of calls."""
    if found.labelled is None:
        for rows in (
            torch.from_numpy(context.data.heldout.tokens.astype(np.int64)).to(device).split(_TOGETHER)
        ):
            yield {"input_ids": rows}
        return
    examples = found.labelled.deciding
    for start in range(0, len(examples), _TOGETHER):
        ids, mask, types = padded(list(examples.items[start : start + _TOGETHER]), padding)
        given = {"input_ids": ids, "attention_mask": mask}
        given |= {} if types is None else {"token_type_ids": types}
        yield {name: torch.from_numpy(value).to(device) for name, value in given.items()}
