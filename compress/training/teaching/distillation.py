"""The objective of learning from a teacher: logits, hidden states, relations, the student's own text.

    loss = (1 - w) D(teacher, student) + w cross-entropy + f(t) (a hidden distance + b relation divergence)

with f falling from 1 to 0 linearly over the first `fade` share of the steps: what lies inside a teacher helps
a student to start, and is in the way of a student of another shape later on. On on-policy steps w is 0,
since the tokens are the student's own.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from compress.context import DistillationContext, Original
from compress.host.processes import process
from compress.training.batches import Batches
from compress.training.objectives.base import Moment, Objective
from compress.training.objectives.losses import chunked, cross_entropy, distillation
from compress.training.plan import Optimization
from compress.training.teaching.guidance import Guidance
from compress.training.teaching.inner import Inner
from compress.training.teaching.onpolicy import continued, draws, on_policy
from compress.training.teaching.sampled import SampledTargets, sampled_kl
from compress.training.teaching.teachers import Teachers


class Distillation(Optimization, Guidance):
    """The fields of passes that learn from a teacher."""

    @classmethod
    def name(cls) -> str:
        """The pass's, for its errors."""
        raise NotImplementedError


def distillation_objective(
    settings: Distillation, student: Original, context: DistillationContext
) -> Objective:
    """The objective of learning as `settings` say; with cached targets the teachers have done their work, and
    their memory is free, when this returns.

    Args:
        settings: what is asked of the teachers, and the plan of the loop that will run the objective.
        student: the model to train.
        context: as the loop's; targets are kept in its `workdir`.

    Raises:
        UserError: a teacher of another vocabulary, or of a shorter context; blocks or heads that the models
            do not have; text or disk that does not suffice.
    """
    window, seed = settings.window or context.data.window, context.seed
    precision, found = settings.precision_on(context.precision), settings.load_teachers(context.teacher)
    teachers = Teachers(student, found, context.device, precision, settings.name(), window)
    digest = teachers.digest
    notes: dict[str, Any] = {
        "teachers": [list(pair) for pair in zip(teachers.sources, teachers.weights, strict=True)]
    }
    if settings.targets == "online":
        inner = Inner(settings, student.model, teachers, seed)
        objective = _Online(settings, teachers, inner, window, seed).objective()
        return replace(objective, identity=digest, notes=notes | inner.notes)
    text = context.data
    batches = Batches(text.train, window, settings.windows, seed, moving=False, begin=text.begin).check()
    numbers = np.unique(np.concatenate([batches.numbers(s) for s in range(settings.steps(batches))]))
    targets = SampledTargets(context.workdir / "targets", numbers, settings.samples)
    with teachers.ready():
        targets.build(
            lambda tokens: teachers.logits(tokens, settings.temperature),
            batches,
            settings.temperature,
            f"{digest} {precision}",
            teachers.device,
            process(),
        )
    notes["target_bytes"] = targets.bytes
    notes["target_positions"] = len(numbers) * window
    notes["target_samples"] = settings.samples
    return replace(_cached(settings, targets), identity=digest, notes=notes)


def _cached(guidance: Guidance, targets: SampledTargets) -> Objective:
    w, temperature = guidance.cross_entropy, guidance.temperature

    def mixed(logits: Tensor, ids: Tensor, weights: Tensor, entropy: Tensor, text: Tensor) -> Tensor:
        soft = (1 - w) * sampled_kl(logits, ids, weights, entropy, temperature)
        return soft + w * cross_entropy(logits, text) if w else soft

    def loss(outputs: Any, inputs: Mapping[str, Any], text: Tensor, moment: Moment) -> Tensor:
        wanted = targets.rows(moment.windows, text.device)
        return chunked(mixed, outputs.logits.flatten(0, 1), *wanted, text.flatten())

    return Objective(loss, moving=False)


class _Online:
    """A teacher that runs beside the student."""

    def __init__(self, guidance: Guidance, teachers: Teachers, inner: Inner, window: int, seed: int) -> None:
        self.guidance, self.teachers, self.inner = guidance, teachers, inner
        self.window, self.seed = window, seed

    def objective(self) -> Objective:
        """For the loop."""
        rewrite = self.rewrite if self.guidance.on_policy else None
        return Objective(self.loss, extra=self.inner.maps, watch=self.watch, rewrite=rewrite)

    @contextmanager
    def watch(self, student: Any) -> Iterator[None]:
        """While the student trains."""
        with ExitStack() as during:
            during.enter_context(self.teachers.ready())
            during.enter_context(self.inner.watching(student))
            yield

    def rewrite(self, student: Any, rows: Tensor, moment: Moment) -> tuple[Tensor, int]:
        """The student's own continuations, on on-policy steps."""
        if not on_policy(self.guidance.on_policy, self.seed, moment.step):
            return rows, 0
        prompt = max(1, round(self.guidance.prompt * self.window))
        uniform = draws(self.seed, moment.step, moment.windows, rows.shape[1] - prompt)
        return continued(student, rows, prompt, self.teachers.precision, uniform), prompt - 1

    def loss(self, outputs: Any, inputs: Mapping[str, Any], text: Tensor, moment: Moment) -> Tensor:
        """See the module's text."""
        guidance, start = self.guidance, moment.start
        wanted = self.teachers.logits(inputs["input_ids"], guidance.temperature)
        logits = outputs.logits
        if start:
            wanted = wanted.view(*text.shape, -1)[:, start:].flatten(0, 1)
            logits, text = logits[:, start:], text[:, start:]
        own = on_policy(guidance.on_policy, self.seed, moment.step)
        w = 0.0 if own else guidance.cross_entropy

        def mixed(logits: Tensor, wanted: Tensor, text: Tensor) -> Tensor:
            return distillation(logits, wanted, text, guidance.divergence, guidance.temperature, w)

        outer = chunked(mixed, logits.flatten(0, 1), wanted, text.flatten())
        return outer + self.inner.loss(moment, text.device) if self.inner.notes else outer
