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
import torch
from torch import Tensor, nn

from compress.context import DistillationContext, Original
from compress.errors import UserError
from compress.host.processes import process
from compress.tasks.registry import task_of
from compress.training.batches import Batches
from compress.training.objectives.base import Moment, Objective
from compress.training.objectives.losses import chunked, cross_entropy, distillation
from compress.training.plan import Optimization
from compress.training.teaching import matching
from compress.training.teaching.guidance import Guidance
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
        inner = _Inner(settings, student.model, teachers, seed)
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


class _Inner:
    """What is matched inside the models, if anything is."""

    def __init__(self, guidance: Guidance, student: Any, teachers: Teachers, seed: int) -> None:
        self.guidance, self.teacher = guidance, teachers.models[0]
        self.causal = task_of(student.config).continues
        self.pairs: list[tuple[str, str]] = []
        self.relations: tuple[list[str], list[str]] = ([], [])
        self.maps = nn.ModuleList()
        self.heads = 0
        self.notes: dict[str, Any] = {}
        if (guidance.hidden or guidance.relations) and len(teachers.models) > 1:
            raise UserError("teachers: hidden states and relations are matched with one teacher; give one")
        if guidance.hidden:
            self._pair_blocks(student, seed)
        if guidance.relations:
            self._relate(student)
        self.student_taps = matching.Taps([s for s, _ in self.pairs] + self.relations[0])
        self.teacher_taps = matching.Taps([t for _, t in self.pairs] + self.relations[1])

    def loss(self, moment: Moment, device: torch.device) -> Tensor | float:
        """The faded sum of both distances, for what the models last computed."""
        weight = max(0.0, 1 - moment.share / self.guidance.fade)
        if not weight:
            return 0.0
        total = torch.zeros((), device=device)
        s, t = self.student_taps, self.teacher_taps
        for (mine, its), through in zip(self.pairs, self.maps, strict=True):
            distance = matching.hidden_distance(s.values[mine], t.values[its], through)
            total = total + self.guidance.hidden / len(self.pairs) * distance
        if self.relations[0]:
            ours, theirs = matching.parts(s, self.relations[0]), matching.parts(t, self.relations[1])
            for left, right in zip(ours, theirs, strict=True):
                divergence = matching.relation_divergence(left, right, self.heads, self.causal)
                total = total + self.guidance.relations * divergence
        return weight * total

    @contextmanager
    def watching(self, student: Any) -> Iterator[None]:
        """Listen to both models while the block runs."""
        with self.student_taps.on(student), self.teacher_taps.on(self.teacher):
            yield

    def _pair_blocks(self, student: Any, seed: int) -> None:
        ours, theirs = matching.block_names(student), matching.block_names(self.teacher)
        pairs = self.guidance.hidden_pairs or matching.uniform_pairs(len(ours), len(theirs))
        for mine, its in pairs:
            self.pairs.append((_at(ours, mine, "hidden_pairs"), _at(theirs, its, "hidden_pairs")))
        small, large = (model.config.get_text_config() for model in (student, self.teacher))
        widths = small.hidden_size, large.hidden_size
        generator = torch.Generator().manual_seed(seed)
        for _ in self.pairs:
            self.maps.append(nn.Identity() if widths[0] == widths[1] else _map(*widths, generator))
        self.notes["hidden_pairs"] = [list(pair) for pair in pairs]

    def _relate(self, student: Any) -> None:
        blocks, models = self.guidance.relation_blocks, (student, self.teacher)
        for model, block in zip(models, blocks, strict=True):
            _at(matching.block_names(model), block, "relation_blocks")
        self.relations = (
            matching.attention_inputs(student, blocks[0]),
            matching.attention_inputs(self.teacher, blocks[1]),
        )
        widths = [w for m, n in zip(models, self.relations, strict=True) for w in matching.widths(m, n)]
        wanted = self.guidance.relation_heads
        if wanted and any(width % wanted for width in widths):
            raise UserError(
                f"relation_heads: {wanted} does not divide the widths {sorted(set(widths))} of queries, keys "
                f"and values; take one that does, as {matching.relation_heads(widths, wanted)}"
            )
        self.heads = wanted or matching.relation_heads(
            widths, student.config.get_text_config().num_attention_heads
        )
        self.notes["relation_heads"] = self.heads


class _Online:
    """A teacher that runs beside the student."""

    def __init__(self, guidance: Guidance, teachers: Teachers, inner: _Inner, window: int, seed: int) -> None:
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


def _map(narrow: int, wide: int, generator: torch.Generator) -> nn.Linear:
    """W: (teacher's width, student's width), rows of norm about 1."""
    # the caller's random numbers stay as they are
    layer = nn.utils.skip_init(nn.Linear, narrow, wide, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(wide, narrow, generator=generator) / narrow**0.5)
    return layer


def _at(names: list[str], block: int, field: str) -> str:
    if not -len(names) <= block < len(names):
        raise UserError(f"{field}: block {block} of a model with {len(names)}; count from 0")
    return names[block]
